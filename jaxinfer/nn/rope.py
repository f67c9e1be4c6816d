"""Rotary position embedding (arXiv 2104.09864) and its context extensions, as pure functions.

Channel i of the first half of `rotary_dim` channels pairs with channel i of the second half
("half-split" order, the one of Hugging Face checkpoints); channels from `rotary_dim` on pass
through. `inverse_frequencies` runs on the host in float32, as the references do, so that far
positions see the same rounding. Extensions: linear position interpolation, Llama 3's low-frequency
slowing, YaRN (arXiv 2309.00071, equations 18-23).

Axis letter R: rotary_dim / 2.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxinfer.config import RopeConfig
from jaxinfer.typing import Leaf


class Rotation(NamedTuple):
    """Cosines and sines of the angles, times the attention factor: two arrays [B, T, R]."""

    cos: Leaf
    sin: Leaf


def inverse_frequencies(rope: RopeConfig) -> np.ndarray:
    """Radians per position of every channel pair, f32[R], after the context extension."""
    exponents = np.arange(0, rope.rotary_dim, 2, dtype=np.float32) / np.float32(rope.rotary_dim)
    frequencies = np.float32(1) / np.float32(rope.theta) ** exponents
    match rope.scaling:
        case "none":
            return frequencies
        case "linear":
            return frequencies / np.float32(rope.factor)
        case "llama3":
            return _llama3(rope, frequencies)
        case "yarn":
            return _yarn(rope, frequencies)
    raise ValueError(f"unknown rope scaling {rope.scaling!r}; known are none, linear, llama3, yarn")


def rotation(
    rope: RopeConfig, positions: Int[Array, "B T"], *, exact: bool = False, dtype: Any = jnp.float32
) -> Rotation:
    """The rotation of tokens at `positions`, in `dtype`.

    The angles are those of the reference implementations, whose float32 products are wrong by
    1e-3 radian at position 1e5 and 2e-2 at 4e6. `exact` counts turns in integers instead, which
    wrap: two tokens' angles differ by their distance's angle to 1e-6 radian at every position.
    """
    frequencies = inverse_frequencies(rope)
    if exact:
        turns = np.round(frequencies.astype(np.float64) / (2 * math.pi) * 2.0**32)
        phase = positions[..., None].astype(jnp.uint32) * jnp.asarray(turns.astype(np.uint32))
        signed = jax.lax.bitcast_convert_type(phase, jnp.int32)
        angles = signed.astype(dtype) * jnp.asarray(2 * math.pi / 2.0**32, dtype)
    else:
        angles = positions[..., None].astype(dtype) * jnp.asarray(frequencies)
    scale = jnp.asarray(rope.attention_factor, dtype)
    return Rotation(jnp.cos(angles) * scale, jnp.sin(angles) * scale)


def rotate(x: Float[Array, "B N T H"], rotation: Rotation) -> Float[Array, "B N T H"]:
    """`x` with its first 2 R channels rotated; computed in f32 or wider, returned in the dtype of
    `x`."""
    width = 2 * rotation.cos.shape[-1]
    rotated = _rotated(x[..., :width], rotation.cos[:, None], rotation.sin[:, None])
    if width == x.shape[-1]:
        return rotated
    return jnp.concatenate([rotated, x[..., width:]], axis=-1)


@jax.jit  # traced once for all layers
def _rotated(x: Array, cos: Array, sin: Array) -> Array:
    return jax.lax.platform_dependent(x, cos, sin, cuda=_by_pairs, default=_by_halves)


def _by_halves(x: Array, cos: Array, sin: Array) -> Array:
    half, dtype = cos.shape[-1], jnp.result_type(x, jnp.float32)
    first, second = x[..., :half].astype(dtype), x[..., half:].astype(dtype)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def _by_pairs(x: Array, cos: Array, sin: Array) -> Array:
    """The same without a concatenation, which XLA:GPU fuses into no kernel with a second result:
    so the kernel that rotates queries also scores the fresh key. XLA:CPU takes 1.5 to 6 times
    longer for it."""
    dtype = jnp.result_type(x, jnp.float32)
    pairs = x.astype(dtype).reshape(*x.shape[:-1], 2, cos.shape[-1])
    signed = jnp.array([[-1], [1]], dtype) * sin[..., None, :]
    rotated = pairs * cos[..., None, :] + pairs[..., ::-1, :] * signed
    return rotated.reshape(x.shape).astype(x.dtype)


def _llama3(rope: RopeConfig, frequencies: np.ndarray) -> np.ndarray:
    """Slows long wave lengths by `factor`, keeps short ones, blends between."""
    context = rope.original_max_positions
    low, high = rope.low_freq_factor, rope.high_freq_factor
    wavelengths = np.float32(2 * math.pi) / frequencies
    # Weight of the original: 0 up to `low` turns over the trained context, 1 from `high` on.
    keep = np.clip((context / wavelengths - low) / (high - low), 0, 1).astype(np.float32)
    return (1 - keep) * frequencies / np.float32(rope.factor) + keep * frequencies


def _yarn(rope: RopeConfig, frequencies: np.ndarray) -> np.ndarray:
    """NTK-by-parts: interpolates channels of fewer than `beta_slow` turns over the context."""

    def channel(turns: float) -> float:
        """The (fractional) channel that makes `turns` turns over the trained context."""
        per_turn = rope.original_max_positions / (turns * 2 * math.pi)
        return rope.rotary_dim * math.log(per_turn) / (2 * math.log(rope.theta))

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    span = high - low if high != low else 0.001  # a step instead of a division by zero
    ramp = np.clip((np.arange(rope.rotary_dim // 2, dtype=np.float32) - low) / span, 0, 1)
    ramp = ramp.astype(np.float32)
    return frequencies / np.float32(rope.factor) * ramp + frequencies * (1 - ramp)
