"""Numbers that users give: how they fit into float32, a random key and a logit bias."""

import math
from collections.abc import Iterable, Mapping
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.arguments import real, shown, whole

LARGEST = float(np.finfo(np.float32).max)
SMALLEST = float(np.finfo(np.float32).tiny)  # of its normal numbers
SEEDS = range(-(2**63), 2**63)


def random_key(seed: int) -> jax.Array:
    """The random key of a seed in `SEEDS`; no two seeds share one.

    It is `jax.random.key(seed)`, which takes no more than 32 bits unless x64 is enabled.
    """
    words = [seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF]
    return jax.random.wrap_key_data(jnp.asarray(words, jnp.uint32), impl="threefry2x32")


def float32_of(value: float) -> float:
    """`value` within float32: finite stays finite, and positive stays positive."""
    if value == 0 or math.isinf(value):
        return value
    return math.copysign(min(max(abs(value), SMALLEST), LARGEST), value)


def sorted_pairs(bias: object) -> tuple[tuple[int, float], ...]:
    """The pairs of a logit bias by token; those of one token added up."""
    pairs = bias.items() if isinstance(bias, Mapping) else bias
    try:
        given = [(token, value) for token, value in cast(Iterable, pairs)]
    except (TypeError, ValueError):
        raise ValueError(
            f"logit_bias must be a mapping or pairs of token and addend, got {shown(bias)}"
        ) from None
    total: dict[int, float] = {}
    for token, value in given:
        number = whole("a token of logit_bias", token, least=-(2**31))
        addend = real(f"logit_bias of token {number}", value)
        if addend == math.inf:  # -inf forbids the token
            raise ValueError(f"logit_bias of token {number} must be below inf")
        total[number] = total.get(number, 0.0) + addend
    return tuple(sorted(total.items()))
