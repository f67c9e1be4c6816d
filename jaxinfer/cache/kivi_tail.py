"""The full-precision tail of KIVI (arXiv 2402.02750): what a push takes out of it and puts there.

The tail is a ring of R slots, token t in slot t mod R. A push brings A fresh tokens behind the n
that are stored, of which a row takes the first `count`.
"""

from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxinfer.cache.base import Items, write_index
from jaxinfer.cache.packed import Packed, decode
from jaxinfer.cache.slots import Slots, load, store


def stored_like(tail: Slots, items: Items) -> Slots:
    """The fresh tokens as the tail holds tokens: rounded before they are quantized, like others."""
    k, v = store(items.k, tail.k.dtype), store(items.v, tail.v.dtype)
    return replace(tail, k=k.swapaxes(2, 3) if tail.layout == "BKHS" else k, v=v)


def completed_blocks(tail: Array, fresh: Array, n_in: Int[Array, " B"], axis: int) -> Array:
    """The (R - 1 + A) // R blocks that a push may complete, as floats; tokens are along `axis`.

    The open block lies in the tail's slots in its order; all further tokens are fresh. Entries
    behind the last token are meaningless.
    """
    residual, width = tail.shape[axis], fresh.shape[axis]
    size = (residual - 1 + width) // residual * residual
    order = jnp.arange(size, dtype=jnp.int32) - (n_in % residual)[:, None]
    new = take(fresh, jnp.clip(order, 0, width - 1), axis)
    widths = [(0, size - residual if i == axis else 0) for i in range(4)]
    return load(jnp.where(along(order < 0, axis), jnp.pad(tail, widths), new))


def oldest(tail: Array, fresh: Array, n_in: Int[Array, " B"]) -> Array:
    """The values of the A tokens from max(n - R, 0) on, which are those that can leave a window of
    R, as floats."""
    residual, width = tail.shape[2], fresh.shape[2]
    token = jnp.maximum(n_in - residual, 0)[:, None] + jnp.arange(width, dtype=jnp.int32)
    old = take(tail, token % residual, 2)
    order = token - n_in[:, None]
    new = take(fresh, jnp.clip(order, 0, width - 1), 2)
    return load(jnp.where(along(order < 0, 2), old, new))


def put_completed(
    tail: Slots,
    new: Packed,
    n_in: Int[Array, " B"],
    count: Int[Array, " B"],
    reads: tuple[Array, ...],
) -> Slots:
    """The tail whose keys are what the last completed block reads as, if any was completed."""
    batch, residual = n_in.shape[0], tail.capacity
    blocks = (n_in + count) // residual - n_in // residual
    last = decode(new.take(jnp.maximum(blocks - 1, 0)[:, None], residual))
    rows = write_index(jnp.where(blocks > 0, jnp.arange(batch), batch), batch, *reads)
    return replace(tail, k=tail.k.at[rows].set(store(last, tail.k.dtype), mode="drop"))


def put_newest(
    tail: Slots,
    fresh: Slots,
    n_in: Int[Array, " B"],
    count: Int[Array, " B"],
    reads: tuple[Array, ...],
    *,
    keeps_completed: bool,
) -> Slots:
    """The tail with the last R of the fresh tokens; with `keeps_completed` without their keys in
    completed blocks."""
    residual = tail.capacity
    order = jnp.arange(fresh.capacity, dtype=jnp.int32)
    token, end = n_in[:, None] + order, (n_in + count)[:, None]
    is_last = (order < count[:, None]) & (token >= end - residual)  # no slot twice
    is_raw = (token >= end // residual * residual) | (not keeps_completed)

    def index(is_written: Array) -> Array:
        return write_index(jnp.where(is_written, token % residual, residual), residual, *reads)

    rows, axis = jnp.arange(n_in.shape[0])[:, None], key_axis(tail)
    where_k = (rows, *(slice(None),) * (axis - 1), index(is_last & is_raw))
    return replace(
        tail,
        k=tail.k.at[where_k].set(jnp.moveaxis(fresh.k, axis, 1), mode="drop"),
        v=tail.v.at[rows, :, index(is_last)].set(jnp.moveaxis(fresh.v, 2, 1), mode="drop"),
    )


def key_axis(tail: Slots) -> int:
    return 3 if tail.layout == "BKHS" else 2


def take(x: Array, index: Int[Array, "B A"], axis: int) -> Array:
    """Entries `index` of `axis` (2 or 3) of x [B, K, _, _], all in range."""
    return jnp.take_along_axis(x, along(index, axis), axis=axis)


def along(x: Array, axis: int) -> Array:
    """[B, A] as an array that varies along the rows and `axis`."""
    return x[:, None, :, None] if axis == 2 else x[:, None, None, :]
