"""Gated and plain feed-forward blocks."""

from collections.abc import Callable

import jax
from jaxtyping import Array, Float

from jaxinfer.config import Activation, ModelConfig
from jaxinfer.nn.linear import linear
from jaxinfer.typing import Params

_ACTIVATIONS: dict[str, Callable] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def activate(kind: Activation, x: Array) -> Array:
    return _ACTIVATIONS[kind](x)


def dense_mlp(
    cfg: ModelConfig, params: Params, x: Float[Array, "B T D"], layer: int
) -> Float[Array, "B T D"]:
    """`down(act(gate(x)) * up(x))`, or `down(act(up(x)))` without a gate.

    The signature is the one `forward(mlp=...)` expects; `layer` serves per-layer sparsity.
    """
    up = linear(params["up"], x)
    if cfg.gated_mlp:
        hidden = activate(cfg.activation, linear(params["gate"], x)) * up
    else:
        hidden = activate(cfg.activation, up)
    return linear(params["down"], hidden)
