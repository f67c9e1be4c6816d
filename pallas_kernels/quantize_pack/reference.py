"""quantize_pack in plain `jnp`."""

import jax
import jax.numpy as jnp


def quantized(x, bits: int, group: int, axis: int, dtype):
    """Codes u32 of `x`, with scale and zero of each group in `dtype`; the codes follow the rounded
    scale and zero, a group without spread has code 0."""
    shape = (*x.shape[:axis], x.shape[axis] // group, group, *x.shape[axis + 1 :])
    grouped, along = x.astype(jnp.float32).reshape(shape), axis + 1
    low, high = grouped.min(axis=along, keepdims=True), grouped.max(axis=along, keepdims=True)
    levels, limit = 2**bits - 1, float(jnp.finfo(dtype).max)
    zero = jnp.clip(low, -limit, limit).astype(dtype)
    scale = jnp.clip((high - low) * jnp.float32(1 / levels), -limit, limit).astype(dtype)
    step = scale.astype(jnp.float32)
    codes = jnp.round((grouped - zero.astype(jnp.float32)) / jnp.where(step > 0, step, 1.0))
    codes = jnp.where(step > 0, jnp.clip(codes, 0, levels), 0.0)
    return codes.astype(jnp.uint32).reshape(x.shape), scale.squeeze(along), zero.squeeze(along)


def packed(codes, bits: int, axis: int):
    count = 32 // bits
    shape = (*codes.shape[:axis], codes.shape[axis] // count, count, *codes.shape[axis + 1 :])
    shifts = (bits * jnp.arange(count, dtype=jnp.uint32)).reshape(
        -1, *(1,) * (codes.ndim - axis - 1)
    )
    return (codes.reshape(shape) << shifts).sum(axis=axis + 1, dtype=jnp.uint32)


def quantize_pack(words, scale, zero, x, index, *, bits: int, group: int, axis: int):
    codes, *metadata = quantized(x, bits, group, axis, scale.dtype)
    new = (packed(codes, bits, axis), *metadata)

    def put(old, new):
        runs = index.shape[1]
        entries = new.shape[2] // runs  # of a run along axis 2
        room = old.shape[2] // entries
        b, k, rest = old.shape[0], old.shape[1], old.shape[3:]
        target = old.reshape(b, k, room, entries, *rest)
        source = new.reshape(b, k, runs, entries, *rest).swapaxes(1, 2)
        rows = jnp.arange(b)[:, None]
        written = target.at[rows, :, index].set(source, mode="drop")
        return written.reshape(old.shape)

    return jax.tree.map(put, (words, scale, zero), new)
