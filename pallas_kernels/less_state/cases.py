"""Uses of LESS's low-rank state."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from pallas_kernels.cases import (
    Case,
    Problem,
    Rng,
    TunedUse,
    array,
    some,
)
from pallas_kernels.less_state import low_rank_read, low_rank_update
from pallas_kernels.less_state.configs import candidates


def cases() -> Iterator[Case]:
    b, k, g, h, rank, hidden = 8, 32, 1, 128, 8, 512
    state = array(b, k, rank, h, dtype="float32"), array(b, k, rank, dtype="float32")

    def weights(*shapes: tuple[int, ...]) -> tuple[Any, ...]:
        return tuple(array(*shape, dtype="float32") for shape in shapes)

    maps = 2 * b * k * (h * hidden + hidden * rank)
    yield Case(
        launch="low_rank_read", config="llama-2 7B, 8 rows", function=low_rank_read,
        operations=maps + 2 * b * k * rank * h,
        args=(
            array(b, k, g, 1, h), *state, *weights((k * g, h, hidden), (k * g, hidden, rank)),
        ),
    )  # fmt: skip
    yield Case(
        launch="low_rank_update", config="llama-2 7B, 8 rows, 1 token", function=low_rank_update,
        operations=maps + 2 * b * k * (rank * rank + rank * h),
        args=(
            *state, array(b, k, 1, h), array(b, k, 1, h), array(b, dtype="int32"),
            *weights((k, h, hidden), (k, hidden, rank), (k, rank, rank), (k, rank), (k, rank)),
        ),
    )  # fmt: skip


def read_problem(rng: Rng, quick: bool) -> Problem:
    b, k, g, t, h, e, r = _shape(rng, quick)
    inner, outer = _layers(rng, k * g, h, e, r)
    num, den = some(rng, "float32", b, k, r, h), jnp.abs(some(rng, "float32", b, k, r))

    def run(*args, implementation):
        acc, top, least = low_rank_read(*args, implementation=implementation)
        total = least * jnp.exp(top)  # what a merge sees; the logarithm of almost 0 is ill-posed
        return acc * total[..., None], total, least

    args = (some(rng, "bfloat16", b, k, g, t, h), num, den, inner, outer)
    facts = {"shape": [b, k, g, t, h], "hidden": e, "rank": r}
    return Problem(run=run, args=args, tolerance=5e-5, facts=facts)


def update_problem(rng: Rng, quick: bool) -> Problem:
    b, k, _, a, h, e, r = _shape(rng, quick)
    inner, outer = _layers(rng, k, h, e, r)
    num, den = some(rng, "float32", b, k, r, h), jnp.abs(some(rng, "float32", b, k, r))
    count = jnp.asarray(rng.integers(0, a + 1, b), jnp.int32)
    mix = some(rng, "float32", k, r, r) / r**0.5
    scales = some(rng, "float32", k, r), some(rng, "float32", k, r)
    items = some(rng, "bfloat16", b, k, a, h), some(rng, "bfloat16", b, k, a, h)
    args = (num, den, *items, count, inner, outer, mix, *scales)
    facts = {"shape": [b, k, a, h], "hidden": e, "rank": r}
    return Problem(run=low_rank_update, args=args, tolerance=5e-5, facts=facts)


def _shape(rng: Rng, quick: bool) -> tuple[int, ...]:
    b, k, g, t = (int(rng.integers(1, high)) for high in ((3, 3, 3, 3) if quick else (9, 9, 4, 6)))
    return b, k, g, t, int(rng.choice([64, 128])), 64, int(rng.choice([8, 16]))


def _layers(rng: Rng, n: int, h: int, e: int, r: int):
    return some(rng, "float32", n, h, e) / h**0.5, some(rng, "float32", n, e, r) / e**0.5


def tuned_read(quick: bool) -> Iterator[TunedUse]:
    yield TunedUse(kernel="low_rank_read", candidates=candidates, tolerance=5e-3)


def tuned_update(quick: bool) -> Iterator[TunedUse]:
    yield TunedUse(kernel="low_rank_update", candidates=candidates, tolerance=5e-3)


CASES = {"less_state": cases}
PROBLEMS = {"low_rank_read": read_problem, "low_rank_update": update_problem}
TUNED = {"low_rank_read": tuned_read, "low_rank_update": tuned_update}
