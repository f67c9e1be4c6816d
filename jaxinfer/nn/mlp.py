"""Gated and plain feed-forward blocks."""

from jaxtyping import Array, Float

from jaxinfer.config import ModelConfig
from jaxinfer.nn.activation import activate
from jaxinfer.nn.linear import linear
from jaxinfer.nn.sparse_mlp import SparseMlp
from jaxinfer.typing import Params


def feed_forward(
    cfg: ModelConfig, params: Params | SparseMlp, x: Float[Array, "B T D"], layer: int
) -> Float[Array, "B T D"]:
    """`down(act(gate(x)) * up(x))`, or `down(act(up(x)))` without a gate; of a `SparseMlp` for the
    neurons that it selects.

    The signature is the one that `forward(mlp=...)` expects.
    """
    if isinstance(params, SparseMlp):
        return params(cfg, x)
    up = linear(params["up"], x)
    if cfg.gated_mlp:
        hidden = activate(cfg.activation, linear(params["gate"], x)) * up
    else:
        hidden = activate(cfg.activation, up)
    return linear(params["down"], hidden)
