"""The methods of distillation by name: filters [F, N] behind their direct samples become K modes.

`hankel+adam` is the one to use: the better of two Hankel starts, refined by
gradient descent, residues solved once more, and of all these the best for each filter. The others
are there to compare with.

Axis letters: F filters, K modes, N samples.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64

from jaxinfer.distill.filters.baselines import modal_truncation, prony
from jaxinfer.distill.filters.dictionary import dictionary_modes
from jaxinfer.distill.filters.modes import Modes, solve_residues, stack, unstack
from jaxinfer.distill.filters.rational import rational
from jaxinfer.distill.filters.realize import balanced_modes, half_hankel_modes
from jaxinfer.distill.filters.refine import PAPER, Recipe, refine
from jaxinfer.nn.modal import ModalFilter, exact_response, modal_filter
from jaxinfer.progress import Report, silent


class Settings(NamedTuple):
    """What a method may look at."""

    steps: int | None = None  # of gradient descent; None: the method's own number
    seed: int = 0  # of the ring start
    report: Report = silent


class Fit(NamedTuple):
    """Filters without direct samples, and for each which of a method's candidates it is."""

    filters: ModalFilter
    won: tuple[str, ...]


def relative_errors(
    filters: ModalFilter, g: Float64[np.ndarray, "F N"]
) -> Float64[np.ndarray, " F"]:
    """`||g - response|| / ||g||` of these very float32 leaves, in float64; 0 for 0 by 0."""
    error = np.linalg.norm(exact_response(filters, g.shape[1] + 1)[:, 1:] - g, axis=1)
    norm = np.linalg.norm(g, axis=1)
    return error / np.where(norm > 0, norm, 1)


def best_of(g: Float64[np.ndarray, "F N"], candidates: Sequence[tuple[str, ModalFilter]]) -> Fit:
    """For each filter the candidate with the least error, the first of equals."""
    errors = np.stack([relative_errors(filters, g) for _, filters in candidates])
    index = errors.argmin(axis=0)
    rows = np.arange(len(index))
    filters = jax.tree.map(
        lambda *leaves: jnp.asarray(np.stack(leaves)[index, rows]),
        *(filters for _, filters in candidates),
    )
    return Fit(filters, tuple(candidates[i][0] for i in index))


def settled(filters: ModalFilter, g: Float64[np.ndarray, "F N"]) -> ModalFilter:
    """The filters with residues solved for their poles as float32 holds them."""
    solved = [
        solve_residues(modes.poles, row) for modes, row in zip(unstack(filters), g, strict=True)
    ]
    return stack(solved, filters.modes)


def hankel_start(g: Float64[np.ndarray, "F N"], count: int) -> Fit:
    """The better of balanced truncation and the half Hankel matrix."""
    starts = [
        (name, stack(modes(g, count), count))
        for name, modes in (("balanced", balanced_modes), ("half Hankel", half_hankel_modes))
    ]
    return best_of(g, starts)


def hankel_adam(g: Float64[np.ndarray, "F N"], count: int, settings: Settings) -> Fit:
    start = hankel_start(g, count)
    recipe = Recipe() if settings.steps is None else Recipe(steps=settings.steps)
    refined = refine(start.filters, g, recipe, settings.report)
    kept = best_of(g, [("start", start.filters), ("start", settled(start.filters, g)),
                       ("refined", refined), ("refined", settled(refined, g))])  # fmt: skip
    names = zip(kept.won, start.won, strict=True)
    return Fit(kept.filters, tuple(first if won == "start" else won for won, first in names))


def paper(g: Float64[np.ndarray, "F N"], count: int, settings: Settings) -> Fit:
    """Radii from 0.9 to 0.99, all angles, residues of variance 1 / K (the authors' notebook)."""
    recipe = PAPER if settings.steps is None else replace(PAPER, steps=settings.steps)
    random = np.random.default_rng(settings.seed)
    shape = (len(g), count)
    angles = 2 * np.pi * random.random(shape)
    poles = random.uniform(0.9, 0.99, shape) * np.exp(1j * angles)
    residues = (random.normal(size=shape) + 1j * random.normal(size=shape)) / np.sqrt(count)
    start = modal_filter(poles, residues, np.zeros(len(g)))
    return Fit(refine(start, g, recipe, settings.report), ("ring",) * len(g))


def _by_modes(modes: Callable[[np.ndarray, int], list[Modes]], name: str) -> "Method":
    def method(g: Float64[np.ndarray, "F N"], count: int, settings: Settings) -> Fit:
        del settings
        return Fit(stack(modes(g, count), count), (name,) * len(g))

    return method


def _rational(g: Float64[np.ndarray, "F N"], count: int, settings: Settings) -> Fit:
    given = {} if settings.steps is None else {"steps": settings.steps}
    return Fit(stack(rational(g, count, **given), count), ("rational",) * len(g))


Method = Callable[[np.ndarray, int, Settings], Fit]

METHODS: Mapping[str, Method] = {
    "hankel+adam": hankel_adam,
    "paper": paper,
    "balanced": _by_modes(balanced_modes, "balanced"),
    "modal": _by_modes(modal_truncation, "modal"),
    "prony": _by_modes(prony, "prony"),
    "rational": _rational,
    "dictionary": _by_modes(dictionary_modes, "dictionary"),
}
