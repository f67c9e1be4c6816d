"""Uses of the modal recurrence and of the Hyena step."""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from pallas_kernels.cases import (
    Case,
    Problem,
    Rng,
    TunedUse,
    array,
    some,
)
from pallas_kernels.modal_step import hyena_step, modal_step
from pallas_kernels.modal_step.configs import candidates


def cases() -> Iterator[Case]:
    b, d, k = 64, 4096, 8
    state = (array(b, d, k, dtype="float32"),) * 2
    modes = (*(array(d, k, dtype="float32"),) * 4, array(d, dtype="float32"))
    yield Case(
        config="64 rows, 4096 channels, 8 modes", function=modal_step, operations=12 * b * d * k,
        args=(*state, array(b, d), *modes),
    )  # fmt: skip
    taps = array(3 * d, 3, dtype="float32"), array(3 * d, dtype="float32")
    yield Case(
        launch="hyena_step", config="64 rows, 4096 channels, 8 modes", function=hyena_step,
        operations=b * d * (12 * k + 20),
        args=(array(b, 3 * d), array(b, 3 * d, 2), *taps, *state, *modes),
    )  # fmt: skip


def problem(rng: Rng, quick: bool) -> Problem:
    b, d, k = int(rng.integers(1, 9)), int(rng.integers(30, 100 if quick else 2000)), 8
    args = (some(rng, "float32", b, d, k), some(rng, "float32", b, d, k))
    args += (some(rng, "bfloat16", b, d), *_filters(rng, d, k))
    facts = {"shape": [b, d, k]}
    return Problem(run=modal_step, args=args, tolerance=7e-3, facts=facts)  # y is rounded


def hyena_problem(rng: Rng, quick: bool) -> Problem:
    b, d, k, taps = int(rng.integers(1, 9)), int(rng.integers(30, 100 if quick else 2000)), 8, 3
    args = (some(rng, "bfloat16", b, 3 * d), some(rng, "bfloat16", b, 3 * d, taps - 1))
    args += (some(rng, "float32", 3 * d, taps), some(rng, "float32", 3 * d))
    args += (some(rng, "float32", b, d, k), some(rng, "float32", b, d, k), *_filters(rng, d, k))
    facts = {"shape": [b, d, k]}
    return Problem(run=hyena_step, args=args, tolerance=7e-3, facts=facts)


def _filters(rng: Rng, d: int, k: int):
    poles = rng.uniform(0.5, 0.999, (d, k)) * np.exp(1j * rng.uniform(0, 2 * np.pi, (d, k)))
    parts = poles.real, poles.imag, *(rng.normal(size=(2, d, k)) / k), rng.normal(size=d)
    return tuple(jnp.asarray(x, jnp.float32) for x in parts)


def tuned(quick: bool) -> Iterator[TunedUse]:
    yield TunedUse(kernel="modal_step", candidates=candidates, tolerance=1e-2)


def tuned_hyena(quick: bool) -> Iterator[TunedUse]:
    for b, d, k in [(2, 64, 4)] if quick else [(64, 4096, 8), (1, 4096, 8)]:
        yield TunedUse(
            kernel="hyena_step", sizes={"b": b, "d": d, "k": k}, candidates=candidates,
            tolerance=1e-2,
        )  # fmt: skip


CASES = {"modal_step": cases}
PROBLEMS = {"modal_step": problem, "hyena_step": hyena_problem}
TUNED = {"modal_step": tuned, "hyena_step": tuned_hyena}
