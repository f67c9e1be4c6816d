"""Numbers that users give: which kind they are, and how they fit into float32 and a random key."""

import math
import numbers
from collections.abc import Iterable, Mapping
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.arguments import shown

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


def real(value: object) -> float | None:
    """A number as a float, None if it is no number."""
    value = _scalar(value)
    if isinstance(value, bool) or not isinstance(value, int | float | numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:  # an int beyond float64, which no setting may be
        return math.inf


def integer(value: object) -> int | None:
    """A whole number as an int, None if it is none."""
    value = _scalar(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _scalar(value: object) -> object:
    """Array scalars as Python's own."""
    if isinstance(value, np.ndarray | np.generic | jax.Array) and value.ndim == 0:
        return value.item()
    return value


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
        number, addend = integer(token), real(value)
        if number is None:
            raise ValueError(f"logit_bias must name tokens by their ids, got {shown(token)}")
        if addend is None or not addend < math.inf:  # -inf forbids the token; NaN fails too
            raise ValueError(
                f"logit_bias of token {number} must be a number below inf, got {shown(value)}"
            )
        total[number] = total.get(number, 0.0) + addend
    return tuple(sorted(total.items()))
