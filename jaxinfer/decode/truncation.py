"""Truncation of a distribution without a sort of the vocabulary.

The threshold of what is kept is found by bisection on the bits of the floats, in 32 exact steps.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

EXCLUDED = -jnp.inf


def keep_top(
    x: Float[Array, "B V"],
    weight: Float[Array, "B V"],
    wanted: Float[Array, " B"],
    asked: Bool[Array, ""] | None,
) -> Float[Array, "B V"]:
    """`x` where it reaches the largest threshold with at least `wanted` weight on or above it.

    Non-positive floats order as the reverse of their bit patterns without the sign, so bisection
    over 31 bits finds the exact threshold. Nothing is looked for where no row `asked`; None says
    that one certainly does.
    """
    code = jax.lax.bitcast_convert_type(-x, jnp.int32)  # x <= 0: a larger code is a smaller x
    code = jnp.where(x == 0, 0, code)  # -0.0 and 0.0 alike

    def halve(_, bounds):
        low, high = bounds  # the smallest code bound that holds enough weight is in (low, high]
        middle = low + (high - low) // 2
        enough = jnp.where(code <= middle[:, None], weight, 0.0).sum(axis=-1) >= wanted
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    low = jnp.full(x.shape[:1], -1, jnp.int32)
    high = jnp.full(x.shape[:1], jnp.int32(2**31 - 2))
    # A number of rounds that is known spares a GPU the question whether there is another one.
    rounds = 32 if asked is None else jnp.where(asked, 32, 0)
    _, high = jax.lax.fori_loop(0, rounds, halve, (low, high))
    return jnp.where(code <= high[:, None], x, EXCLUDED)
