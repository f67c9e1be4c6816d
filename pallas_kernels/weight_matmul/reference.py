"""Weights of 4 or 8 bits: how they are stored, made and read, and their product in plain `jnp`.

Every `group` consecutive inputs of an output share one scale and one *integer* zero point, as in
GPTQ (arXiv 2210.17323) and AWQ (arXiv 2306.00978):

    w[o, i] = scale[i // group, o] * (c[o, i] - zero[i // group, o])

`c - zero` is an integer, so that the scale waits for the sum of its group. The layout is made for a
GPU that reads every word once. Word w of input i holds the codes of the outputs w, W + w, 2 W + w,
..., the first in the lowest bits (W words an input, 32 / bits codes a word):

- neighbouring words belong to neighbouring outputs and one input: the rows of a tile are contiguous
  (W is padded to a multiple of 4 words, so that every row begins on 16 bytes);
- all codes of a word meet the same activation, which is loaded once;
- each lane of a tile of words, transposed, is the left operand of a dot: consecutive outputs, whose
  scales and results are contiguous too.

A shard along the outputs is therefore quantized by itself. Axis letters: O outputs, I inputs,
R rows of activations.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.shapes import blocks_of

BITS, GROUPS = (4, 8), (16, 32, 64, 128)  # one dot takes a group: 16 at least, registers at most
SCALE_DTYPES = ("bfloat16", "float16")
ALIGNED = 4  # words: a load of 16 bytes


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """A weight [O, I] in codes and scales; `zero` None stands for 2**(bits - 1) everywhere."""

    codes: Any  # u32[I, W]
    scale: Any  # bf16 or f16 [I / group, O]
    zero: Any = None  # u8[I / group, O] or None
    bits: int = field(metadata={"static": True})
    group: int = field(metadata={"static": True})
    outputs: int = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """[O, I] of the weight that this stands for."""
        return self.outputs, self.codes.shape[0]


def words_of(outputs: int, bits: int) -> int:
    """W, the words that hold the codes of one input."""
    return blocks_of(outputs * bits, 32 * ALIGNED) * ALIGNED


def quantize_weight(
    w: Array,
    bits: int,
    group: int,
    *,
    is_symmetric: bool | None = None,
    scale_dtype: str = "bfloat16",
) -> QuantizedWeight:
    """The weight w [O, I] in codes of 4 or 8 bits; by default 8 bits are symmetric, 4 are not.

    Each weight is off by at most half of the stored scale: a group's range is made to include 0,
    and the scale is rounded up, so that no weight lies outside of what the codes reach.

    Example:
      >>> w = jnp.linspace(-1.0, 1.0, 8 * 64).reshape(8, 64)
      >>> weight = quantize_weight(w, bits=4, group=32)
      >>> weight.shape, weight.codes.shape, weight.scale.shape
      ((8, 64), (64, 4), (2, 8))
      >>> bool((abs(dequantize_weight(weight) - w) <= weight.scale.max() / 2).all())
      True
    """
    _check(w, bits, group, scale_dtype)
    outputs, inputs = w.shape
    grouped = w.astype(jnp.float32).reshape(outputs, inputs // group, group)
    low, high = jnp.minimum(grouped.min(axis=2), 0), jnp.maximum(grouped.max(axis=2), 0)
    levels, middle = 2**bits - 1, 2 ** (bits - 1)
    is_symmetric = bits == 8 if is_symmetric is None else is_symmetric
    if is_symmetric:
        step = jnp.maximum(high / (middle - 1), -low / middle)
    else:
        step = (high - low) / levels
    scale = _rounded_up(step, scale_dtype)
    step = scale.astype(jnp.float32)
    step = jnp.where(step > 0, step, 1.0)
    zero = jnp.full_like(step, middle) if is_symmetric else jnp.round(-low / step)
    codes = jnp.clip(jnp.round(grouped / step[..., None]) + zero[..., None], 0, levels)
    return QuantizedWeight(
        codes=_packed(codes.reshape(w.shape).astype(jnp.uint32), bits),
        scale=scale.T,
        zero=None if is_symmetric else zero.T.astype(jnp.uint8),
        bits=bits,
        group=group,
        outputs=outputs,
    )


def dequantize_weight(weight: QuantizedWeight) -> Float[Array, "O I"]:
    """What `weight` stands for, in float32."""
    shifts = jnp.arange(0, 32, weight.bits, dtype=jnp.uint32)
    codes = (weight.codes[:, None] >> shifts[None, :, None]) & jnp.uint32(2**weight.bits - 1)
    codes = codes.reshape(codes.shape[0], -1)[:, : weight.outputs].astype(jnp.float32)
    zero = jnp.float32(2 ** (weight.bits - 1))
    if weight.zero is not None:
        zero = jnp.repeat(weight.zero.astype(jnp.float32), weight.group, axis=0)
    scale = jnp.repeat(weight.scale.astype(jnp.float32), weight.group, axis=0)
    return ((codes - zero) * scale).T


def dequantize_rows(weight: QuantizedWeight, indices: Array) -> Float[Array, "... I"]:
    """Rows `indices` (below O) of what `weight` stands for, in float32; nothing else is read."""
    words, mask = weight.codes.shape[1], jnp.uint32(2**weight.bits - 1)
    shifts = (weight.bits * (indices // words)).astype(jnp.uint32)
    codes = ((weight.codes[:, indices % words] >> shifts) & mask).astype(jnp.float32)
    zero = jnp.float32(2 ** (weight.bits - 1))
    if weight.zero is not None:
        zero = jnp.repeat(weight.zero[:, indices].astype(jnp.float32), weight.group, axis=0)
    scale = jnp.repeat(weight.scale[:, indices].astype(jnp.float32), weight.group, axis=0)
    return jnp.moveaxis((codes - zero) * scale, 0, -1)


def weight_matmuls(x: Array, weights: tuple[QuantizedWeight, ...]) -> tuple[Array, ...]:
    return tuple(_product(x, weight) for weight in weights)


def _product(x: Array, weight: QuantizedWeight) -> Float[Array, "R O"]:
    return jnp.einsum(
        "ri,oi->ro",
        jax.lax.reduce_precision(x.astype(jnp.float32), 8, 7),  # XLA drops a cast there and back
        dequantize_weight(weight),
        precision=jax.lax.Precision.HIGHEST,
    )


def _check(w: Array, bits: int, group: int, scale_dtype: str) -> None:
    if bits not in BITS:
        raise ValueError(f"codes have 4 or 8 bits, got {bits}")
    if group not in GROUPS:
        raise ValueError(f"group must be 16, 32, 64 or 128 inputs, got {group}")
    if scale_dtype not in SCALE_DTYPES:
        raise ValueError(f"scale_dtype must be one of {SCALE_DTYPES}, got {scale_dtype!r}")
    if w.ndim != 2 or w.shape[1] % group:
        raise ValueError(
            f"w must have shape [outputs, a multiple of group {group}], got {list(w.shape)}"
        )


def _rounded_up(x: Array, dtype: str) -> Array:
    """The smallest numbers of `dtype` that are not below `x` (>= 0)."""
    nearest = x.astype(dtype)
    above = jnp.nextafter(nearest, jnp.full_like(nearest, jnp.inf))
    return jnp.where(nearest.astype(x.dtype) < x, above, nearest)


def _packed(codes: Array, bits: int) -> Array:
    """u32[I, W] of codes u32[O, I]."""
    outputs, inputs = codes.shape
    lanes, words = 32 // bits, words_of(outputs, bits)
    codes = jnp.pad(codes.T, ((0, 0), (0, lanes * words - outputs)))
    shifts = jnp.arange(0, 32, bits, dtype=jnp.uint32)
    parts = codes.reshape(inputs, lanes, words) << shifts[None, :, None]
    return parts.sum(axis=1, dtype=jnp.uint32)
