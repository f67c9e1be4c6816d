"""Group quantization and codes packed into words (KIVI, arXiv 2402.02750, section 3.1) in plain
`jnp`; imports no kernel language.

A group x of consecutive numbers along one axis is stored as codes c with one scale and one zero:

    zero = min x,   scale = (max x - min x) / (2**bits - 1),   c = round((x - zero) / scale)

and read as `c * scale + zero`. The codes follow the *rounded* scale and zero that are stored, in
float32, so that the error stays within half a step. Word w of packed codes holds the codes
[w * F, (w + 1) * F) of its axis, F = 32 / bits, the first in the lowest bits. The axis of the
groups and that of the words are independent choices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

BITS = (2, 4, 8)
SCALE_DTYPES = ("float16", "bfloat16", "float32")


class Quantized(NamedTuple):
    """Codes in the shape of what was quantized; `scale` and `zero` have one entry per group."""

    codes: UInt32[Array, "..."]
    scale: Float[Array, "..."]
    zero: Float[Array, "..."]


def quantize(
    x: Float[Array, "..."], bits: int, group: int, axis: int, dtype: str = "float16"
) -> Quantized:
    """Codes of `x` in groups of `group` consecutive entries of `axis`, metadata in `dtype`.

    A group without spread, or whose scale rounds to 0, gets code 0 everywhere and reads as its
    rounded minimum. Metadata beyond the range of `dtype` saturates. A group with a NaN reads as
    NaN.
    """
    grouped = _split(x.astype(jnp.float32), axis, group, "group")
    along = axis % x.ndim + 1
    low, high = grouped.min(axis=along, keepdims=True), grouped.max(axis=along, keepdims=True)
    levels = 2 ** _checked(bits) - 1
    zero = _saturate(low, dtype)
    # the product with a constant: what XLA makes of a division depends on the program around it
    scale = _saturate((high - low) * jnp.float32(1 / levels), dtype)
    step = scale.astype(jnp.float32)
    safe = jnp.where(step > 0, step, 1.0)
    codes = jnp.round((grouped - zero.astype(jnp.float32)) / safe)
    codes = jnp.where(step > 0, jnp.clip(codes, 0, levels), 0.0)  # NaN: code 0, its zero is NaN
    return Quantized(
        codes.astype(jnp.uint32).reshape(x.shape), scale.squeeze(along), zero.squeeze(along)
    )


def dequantize(
    codes: UInt32[Array, "..."],
    scale: Float[Array, "..."],
    zero: Float[Array, "..."],
    group: int,
    axis: int,
    dtype: str = "float32",
) -> Float[Array, "..."]:
    """`codes * scale + zero`, computed in float32."""
    if codes.shape[axis] != scale.shape[axis] * group:
        raise ValueError(
            f"axis {axis} has {codes.shape[axis]} codes, {scale.shape[axis]} scales of {group} each"
        )
    scale, zero = (jnp.repeat(x.astype(jnp.float32), group, axis) for x in (scale, zero))
    return (codes.astype(jnp.int32).astype(jnp.float32) * scale + zero).astype(dtype)


def pack(codes: UInt32[Array, "..."], bits: int, axis: int) -> UInt32[Array, "..."]:
    """Words of `32 // bits` consecutive codes of `axis`, which shrinks by that factor."""
    lanes = _split(codes, axis, 32 // _checked(bits), "word")
    words = lanes << _shifts(bits, axis % codes.ndim, codes.ndim)
    return words.sum(axis=axis % codes.ndim + 1, dtype=jnp.uint32)


def unpack(words: UInt32[Array, "..."], bits: int, axis: int) -> UInt32[Array, "..."]:
    """The codes of `pack`."""
    axis = axis % words.ndim
    count = 32 // _checked(bits)
    # Repeated words and long rows of shifts: in a loop, XLA CPU makes vector code of this form but
    # not of one with the lanes as an axis of their own (0.07 against 0.5 ms for 786k codes).
    lanes = jnp.repeat(words, count, axis)
    order = jnp.arange(lanes.shape[axis], dtype=jnp.uint32) % count
    shifts = (bits * order).reshape(-1, *(1,) * (words.ndim - axis - 1))
    return (lanes >> shifts) & jnp.uint32(2**bits - 1)


def put_runs(old: Array, new: Array, index: Int[Array, "B M"], axis: int) -> Array:
    """`old` with run m of `new`, which consists of M equal runs along `axis`, at run `index[b, m]`;
    too large an index writes nothing.

    One scatter of windows into the array as it is: of one row and run XLA CPU makes an update in
    place, but a whole copy where the array is split into runs first.
    """
    rows, count = index.shape
    entries = new.shape[axis] // count
    split = new.reshape(*new.shape[:axis], count, entries, *new.shape[axis + 1 :])
    start = jnp.stack([jnp.broadcast_to(jnp.arange(rows)[:, None], index.shape), index * entries])
    return jax.lax.scatter(
        old,
        jnp.moveaxis(start, 0, -1),
        jnp.moveaxis(split, axis, 1),
        jax.lax.ScatterDimensionNumbers(
            update_window_dims=tuple(range(2, new.ndim + 1)),
            inserted_window_dims=(0,),
            scatter_dims_to_operand_dims=(0, axis),
        ),
        mode=jax.lax.GatherScatterMode.FILL_OR_DROP,
    )


def _checked(bits: int) -> int:
    if bits not in BITS:
        raise ValueError(f"codes have 2, 4 or 8 bits, got {bits}")
    return bits


def _split(x: Array, axis: int, size: int, what: str) -> Array:
    """`axis` as (number of parts, `size`)."""
    axis = axis % x.ndim
    length = x.shape[axis]
    if length % size:
        raise ValueError(f"axis {axis} of length {length} does not split into {what}s of {size}")
    return x.reshape(*x.shape[:axis], length // size, size, *x.shape[axis + 1 :])


def _shifts(bits: int, axis: int, ndim: int) -> Array:
    """The bit offsets of a word's codes along the lane axis behind `axis`."""
    offsets = jnp.arange(0, 32, bits, dtype=jnp.uint32)
    return offsets.reshape(-1, *(1,) * (ndim - axis - 1))


def _saturate(x: Array, dtype: str) -> Array:
    limit = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -limit, limit).astype(dtype)
