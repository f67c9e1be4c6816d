"""DejaVu's predictors: which neurons, or groups of heads, a token will need (arXiv 2310.17157,
section 4.1).

Two linear layers without biases and without an activation between them: a linear classifier of low
rank, one per layer and kind of block. They are trained for all layers at once (`stacked`) and serve
as `jaxinfer.sparsity.base.Router`.

Axis letters: L layers, R rows, D width, J units, P rank.
"""

import flax.linen as nn
from jaxtyping import Array, Float

from jaxinfer.sparsity.base import Router, Rule
from jaxinfer.typing import Params


def rank_of(width: int) -> int:
    """The rank of predictors that read `width` channels: a sixteenth of them, between 32 and 1024.

    The 1000 of the paper's code would be four fifths of the bytes of a small model's blocks.
    """
    return min(max(round(width / 256) * 16, 32), 1024)


class Predictor(nn.Module):
    """One logit per unit."""

    units: int
    rank: int

    @nn.compact
    def __call__(self, x: Float[Array, "R D"]) -> Float[Array, "R J"]:
        inner = nn.Dense(self.rank, use_bias=False, name="inner")(x)
        return nn.Dense(self.units, use_bias=False, name="outer")(inner)


def stacked(units: int, rank: int) -> nn.Module:
    """The predictors of several layers: inputs [L, R, D] and parameters have the layers in front,
    and each layer draws its own at the start."""
    each = nn.vmap(
        Predictor, in_axes=0, out_axes=0, variable_axes={"params": 0}, split_rngs={"params": True}
    )
    return each(units, rank)


def matrices(params: Params) -> dict[str, Array]:
    """`inner` [..., P, D] and `outer` [..., J, P] of a predictor's parameters, outputs first."""
    return {name: params[name]["kernel"].swapaxes(-1, -2) for name in ("inner", "outer")}


def router(matrices: Params, rule: Rule, lookahead: float | None) -> Router:
    """What one layer's predictor is when it serves."""
    return Router(**matrices, rule=rule, lookahead=lookahead)
