"""The residual sum and norm in plain `jnp`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def normalised(
    x: Float[Array, "... D"], scale: Array, bias: Array | None = None, *, kind: str, eps: float
) -> Float[Array, "... D"]:
    """`x` normalised over its last axis in float32, scaled and shifted, in the dtype of `x`."""
    y = x.astype(jnp.float32)
    if kind == "layer":
        y = y - y.mean(axis=-1, keepdims=True)
    square = jnp.mean(y * y, axis=-1, keepdims=True)
    y = y / (jnp.sqrt(square) + eps) if kind == "rms_outside" else y * jax.lax.rsqrt(square + eps)
    y = y * scale.astype(jnp.float32)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(x.dtype)


def add_norm(x, delta, scale, bias, *, kind, eps):
    y = x if delta is None else (x + delta).astype(x.dtype)
    return y, normalised(y, scale, bias, kind=kind, eps=eps)
