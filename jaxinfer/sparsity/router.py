"""LTE's sigmoid routers and the gates they give (arXiv 2402.06126, section 4.2).

A block of neurons has the score sigmoid(w x + b) at the input x of its feed-forward block. While
it is trained every block runs and its output is multiplied by a gate; when it serves, those with a
score above 1/2 run and the others do not, which is a logit above 0: `as_router`.

Axis letters: R rows, D width, J blocks.
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinfer.sparsity.base import Router, Rule
from jaxinfer.typing import Params

Start = Literal["normal", "centres", "all_on"]
"""How routers begin. The paper does not say; "normal" is the usual guess, with logits around 0, and
a random half of the blocks on. "centres" scores the likeness of the input to the mean of the
block's input weights; "all_on" begins as the dense model."""

OPEN = Rule(threshold=0.0)
"""A score above 1/2."""

SPREAD, ALL_ON = 0.02, 2.0  # of the first weights; the first bias where all blocks are on


class SigmoidRouter(nn.Module):
    """Logits f32[R, J] of inputs [R, D]; parameters `outer` [J, D] and, with a start that has one,
    `bias` [J]."""

    units: int
    start: Start = "all_on"

    @nn.compact
    def __call__(
        self, x: Float[Array, "R D"], centres: Float[Array, "J D"] | None = None
    ) -> Float[Array, "R J"]:
        """`centres` are for the start of that name, in `init` only: the means of the blocks' input
        weights, of length 1."""

        def first(key: Array, shape: tuple[int, int]) -> Array:
            if self.start != "centres":
                return SPREAD * jax.random.normal(key, shape)
            if centres is None:
                raise ValueError("routers that start at the centres of their blocks need these")
            length = jnp.linalg.norm(centres, axis=1, keepdims=True)
            return centres / jnp.maximum(length, 1e-12)

        params = {"outer": self.param("outer", first, (self.units, x.shape[-1]))}
        if self.start == "all_on":
            params["bias"] = self.param("bias", nn.initializers.constant(ALL_ON), (self.units,))
        return as_router(params).scores(x)


def as_router(params: Params, rule: Rule = OPEN) -> Router:
    """The router that serves what was trained."""
    return Router(outer=params["outer"], bias=params.get("bias"), rule=rule)


def soft(logits: Float[Array, "R J"]) -> Float[Array, "R J"]:
    """The gates of stage 1 in the paper: the scores themselves."""
    return jax.nn.sigmoid(logits)


def hard(logits: Float[Array, "R J"]) -> Float[Array, "R J"]:
    """The gates of stage 2 and of serving: 1 above a score of 1/2, else 0; without a gradient."""
    return jax.lax.stop_gradient((logits > 0).astype(logits.dtype))


def straight_through(logits: Float[Array, "R J"]) -> Float[Array, "R J"]:
    """The values of `hard`, exactly, with the gradient of `soft` (DSMoE, arXiv 2502.12455)."""
    scores = soft(logits)
    return hard(logits) + (scores - jax.lax.stop_gradient(scores))
