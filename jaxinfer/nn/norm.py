"""RMS and layer normalisation, computed in float32 and cast back to the input's dtype."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinfer.config import Norm
from jaxinfer.typing import Params


def norm(
    params: Params, x: Float[Array, "... D"], *, kind: Norm, eps: float
) -> Float[Array, "... D"]:
    """`x` normalised over its last axis, scaled and (where the parameters have a bias) shifted."""
    y = x.astype(jnp.float32)
    if kind == "layer":
        y = y - y.mean(axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    y = y * params["scale"].astype(jnp.float32)
    if "bias" in params:
        y = y + params["bias"].astype(jnp.float32)
    return y.astype(x.dtype)
