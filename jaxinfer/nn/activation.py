"""The activation functions of feed-forward blocks."""

from collections.abc import Callable

import jax
from jaxtyping import Array

from jaxinfer.config import Activation

_ACTIVATIONS: dict[str, Callable] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def activate(kind: Activation, x: Array) -> Array:
    return _ACTIVATIONS[kind](x)
