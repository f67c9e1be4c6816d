"""put_tokens and swap_tokens in plain `jnp`.

Beside what the kernels write, the reference knows keys that are stored transposed, with their
tokens along axis 3, and bfloat16 stored as the bits of uint16: what XLA CPU is fast with.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.ordering import write_index


def put_tokens(stored, tokens, index, after, *, axes: tuple[int, ...]):
    """`axes` are those of the slots of each array."""
    (batch, heads), capacity = stored[0].shape[:2], stored[0].shape[axes[0]]
    index = write_index(jnp.where(index < 0, capacity, index), capacity, *after)
    rows = jnp.arange(batch)
    if index.ndim == 2 and 3 not in axes:
        # XLA:GPU writes one element per index on its own, but a run of heads by a loop of updates.
        index = jnp.broadcast_to(index[:, None], (batch, heads, index.shape[1]))
    if index.ndim == 2:
        lead = (rows[:, None], slice(None))
    else:
        lead = (rows[:, None, None], jnp.arange(heads)[None, :, None])

    def put(old: Array, new: Array, axis: int) -> Array:
        new = as_stored(new, old.dtype)
        if index.ndim == 2:
            new = jnp.moveaxis(new, 2, 1)  # [B, A, K, ...]
        elif new.shape[1] != heads:
            new = jnp.broadcast_to(new, (batch, heads, *new.shape[2:]))
        where = (*lead, *(slice(None),) * (axis - 2), index)
        return old.at[where].set(new, mode="drop")

    return tuple(put(*parts) for parts in zip(stored, tokens, axes, strict=True))


def swap_tokens(stored, tokens, index, after, *, axes: tuple[int, ...]):
    capacity = stored[0].shape[axes[0]]
    by_head = index if index.ndim == 3 else index[:, None]
    is_put = (by_head >= 0) & (by_head < capacity)
    place = jnp.clip(by_head, 0, capacity - 1)

    def either(old: Array, new: Array, axis: int) -> Array:
        old = as_floats(take(old, place, axis))
        return jnp.where(is_put.reshape(*is_put.shape, *(1,) * (old.ndim - 3)), old, new)

    left = tuple(either(*parts) for parts in zip(stored, tokens, axes, strict=True))
    # Read once: XLA:GPU would repeat the gather for each of its users, of which only those that
    # `write_index` knows of are sure to come before the write.
    left = jax.lax.optimization_barrier(left)
    read = tuple(x for x in left if x.ndim == 4)
    return put_tokens(stored, tokens, index, (*read, *after), axes=axes), left


def take(x: Array, index: Int[Array, "B _ A"], axis: int) -> Array:
    """The tokens of x in the slots `index` [B, K|1, A], all in range: [B, K, A] or [B, K, A, H]."""
    index = jnp.broadcast_to(index, (*x.shape[:2], index.shape[2]))
    if axis == 3:
        return jnp.take_along_axis(x, index[:, :, None], axis=3).swapaxes(2, 3)
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 3)), axis=2)


def as_stored(x: Array, dtype: jnp.dtype) -> Array:
    """`x` rounded to `dtype`, uint16 being the bits of bfloat16; what is too large for float16
    becomes its largest number."""
    if dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    if dtype == jnp.float16 and x.dtype != dtype:
        limit = float(jnp.finfo(dtype).max)
        # bfloat16 would round the limit itself, up to what is infinity in float16.
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        x = jnp.where(x > limit, limit, jnp.where(x < -limit, -limit, x))  # NaN stays
    return x.astype(dtype)


def as_floats(x: Array) -> Array:
    """Stored numbers as floats."""
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x
