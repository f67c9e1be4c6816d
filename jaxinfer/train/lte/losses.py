"""LTE's losses (arXiv 2402.06126, equations 4 to 6) and what is logged beside them.

Axis letters: R rows (tokens), J blocks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

THRESHOLD = 0.5
UNCERTAIN = (0.4, 0.6)


def efficiency(
    scores: Float[Array, "R J"], valid: Bool[Array, " R"] | None = None
) -> Float[Array, ""]:
    """The mean squared score (equation 4), over the `valid` rows (None: all)."""
    return over_rows(scores**2, valid)


def separation(
    scores: Float[Array, "R J"], valid: Bool[Array, " R"] | None = None, *, epsilon: float = 0.0
) -> Float[Array, ""]:
    """The mean of 1 / ((score - 1/2)^2 + epsilon): it pushes scores away from the threshold
    (equation 5, which has no epsilon and is infinite at a score of 1/2). At scores of 0 and 1 and
    epsilon 0 it is 4, its least."""
    return over_rows(1 / ((scores - THRESHOLD) ** 2 + epsilon), valid)


def over_rows(values: Float[Array, "R J"], valid: Bool[Array, " R"] | None) -> Float[Array, ""]:
    """The mean over all entries of the valid rows."""
    each = values.mean(axis=1)
    if valid is None:
        return each.mean()
    return jnp.where(valid, each, 0).sum() / jnp.maximum(valid.sum(), 1)


class RouterStatistics(NamedTuple):
    """Of one layer's router over the valid tokens, f32[] each: the two losses, the share of blocks
    that are selected, of tokens that select none, and of scores near the threshold."""

    efficiency: Array
    separation: Array
    density: Array
    empty: Array
    uncertain: Array


def statistics(
    logits: Float[Array, "R J"],
    selected: Bool[Array, "R J"],
    valid: Bool[Array, " R"] | None,
    epsilon: float,
) -> RouterStatistics:
    """What `RouterStatistics` lists."""
    scores = jax.nn.sigmoid(logits)
    near = (scores > UNCERTAIN[0]) & (scores < UNCERTAIN[1])
    return RouterStatistics(
        efficiency=efficiency(scores, valid),
        separation=separation(scores, valid, epsilon=epsilon),
        density=over_rows(selected.astype(jnp.float32), valid),
        empty=over_rows(~selected.any(axis=1, keepdims=True) * 1.0, valid),
        uncertain=over_rows(near.astype(jnp.float32), valid),
    )
