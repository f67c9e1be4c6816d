"""How many modes and taps a bank needs for a tolerance. All filters of a bank get as many, as the
shapes of its layer are static.

A filter that ends, like a pure delay, has no modal form, as the matrix of its recurrence is
nilpotent; taps, which are copied samples, take what it has.

Axis letters: F filters, N samples (lags 1 to N).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from jaxinfer.distill.filters.methods import hankel_start, relative_errors
from jaxinfer.distill.filters.spectrum import half, hankel_spectrum

MOST_MODES = 128
"""Of an automatic order: a filter that needs more is better decoded exactly."""

TAPS = (1, 2, 4, 8, 16, 32)
"""Of which an automatic number of taps is one."""

GROWTH = (1.0, 1.25, 1.5, 2.0)
"""Times the modes that the spectrum suggests."""


class Size(NamedTuple):
    """K modes behind P taps."""

    modes: int
    taps: int


def spectral_modes(g: Float64[np.ndarray, "F N"], tolerance: float) -> int:
    """The modes that singular values suggest: a filter needs about as many states as it has values
    above the tolerance's share of the first. (The zero-padded matrix would count the cut of a
    filter that has not faded.) One that needs more than `MOST_MODES`, or nearly as many as noise,
    does not count."""
    most = min(MOST_MODES, g.shape[1] // 5)
    values = hankel_spectrum(g, half(g.shape[1]), 2 * most + 1).values
    needed = -(-(values > tolerance * values[:, :1]).sum(axis=1) // 2)
    return int(max(1, needed[needed <= most].max(initial=0)))


def grown_modes(g: Float64[np.ndarray, "F N"], base: int, tolerance: float) -> int:
    """The modes, from `base` to twice as many, behind which more bring no other filter's Hankel
    start to the tolerance; the suggestion's error is one to two tolerances."""
    counts = [min(g.shape[1] // 2, round(factor * base)) for factor in GROWTH]
    cured = []
    for count in counts:
        cured.append(_errors(g, count) <= tolerance)
        if cured[-1].all():
            break
    return next(count for count, done in zip(counts, cured, strict=False) if done[cured[-1]].all())


def choose_taps(g: Float64[np.ndarray, "F N"], count: int, tolerance: float) -> int:
    """The fewest of `TAPS` that bring all filters to the tolerance which any of them bring there
    and modes of as many bytes do not; 0 where there are none such."""
    failing = g[_errors(g, count) > tolerance]
    sizes = [size for size in TAPS if size + 2 * count <= g.shape[1]]
    if not sizes or not len(failing):
        return 0
    found = 0
    waiting = failing[_errors_behind(failing, sizes[-1], count) <= tolerance]
    for size in sizes:
        if not len(waiting):
            break
        cured = _errors_behind(waiting, size, count) <= tolerance
        same_bytes = min(count + -(-size // 2), g.shape[1] // 2)
        if cured.any() and (_errors(waiting[cured], same_bytes) > tolerance).any():
            found = size
        waiting = waiting[~cured]
    return found


def _errors(g: np.ndarray, count: int) -> np.ndarray:
    return relative_errors(hankel_start(g, count).filters, g)


def _errors_behind(g: np.ndarray, taps: int, count: int) -> np.ndarray:
    """Errors of modes behind taps, relative to the whole filters."""
    behind = g[:, taps:]
    return _errors(behind, count) * np.linalg.norm(behind, axis=1) / np.linalg.norm(g, axis=1)
