"""A matrix product with an optional bias, and the product with a tied embedding."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinfer.typing import Params


def linear(params: Params, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
    """`x @ kernel + bias` with kernel [I, O]."""
    y = x @ params["kernel"]
    return y + params["bias"] if "bias" in params else y


def unembed_tied(tokens: Float[Array, "V D"], x: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """`x @ tokens.T` in float32, without a transposed copy of the embedding."""
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, tokens, contract, preferred_element_type=jnp.float32)
