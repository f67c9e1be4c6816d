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

LADDER = sorted({round(2 ** (step / 4)) for step in range(4 * 8 + 1)})
"""Numbers of modes that are tried beyond what the spectrum suggests."""

NOISE = 0.12
"""The share of the first singular value above which the value behind `_most` modes is that of white
noise, or of a delay (0.13 to 1 in matrices of 24 to 1,024 rows), and not of a filter that fades."""


class Size(NamedTuple):
    """K modes behind P taps."""

    modes: int
    taps: int


def spectral_modes(g: Float64[np.ndarray, "F N"], tolerance: float) -> int:
    """The modes that singular values suggest: a filter needs about as many states as it has values
    above the tolerance's share of the first, and gets `MOST_MODES` at most. (The zero-padded matrix
    would count the cut of a filter that has not faded.) Noise does not count."""
    values, fades = _spectrum(g)
    needed = -(-(values > tolerance * values[:, :1]).sum(axis=1) // 2)
    return int(max(1, np.minimum(needed, _most(g))[fades].max(initial=0)))


def grown_modes(g: Float64[np.ndarray, "F N"], base: int, tolerance: float) -> int:
    """The fewest modes, from `base` to twice as many, whose Hankel start is within the tolerance
    for every filter but noise; as many as that if none is. The suggestion's error is one to two
    tolerances. As all tolerances share `LADDER`, a tighter one never gets fewer modes."""
    g = g[_spectrum(g)[1]]
    most = min(g.shape[1] // 2, 2 * base)
    counts = [count for count in LADDER if base <= count <= most] or [min(base, most)]
    fits = (count for count in counts if (_errors(g, count) <= tolerance).all())
    return next(fits, counts[-1])


def _spectrum(g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Singular values, and which filters fade rather than being noise, whatever the tolerance."""
    values = hankel_spectrum(g, half(g.shape[1]), 2 * _most(g) + 1).values
    return values, values[:, -1] <= NOISE * values[:, 0]


def _most(g: np.ndarray) -> int:
    """Noise of N samples is as good as determined by N / 2 states."""
    return max(1, min(MOST_MODES, g.shape[1] // 5))


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
