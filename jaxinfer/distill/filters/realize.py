"""Poles from the singular vectors of a Hankel matrix, by the shift invariance of its column space.

Without its last row the leading left vectors U span nearly the same space as without the first:
`U_below = U_above A`, and the poles are the eigenvalues of A. Two matrices, two rules:

- zero-padded, N x N, all samples with zeros behind: balanced truncation (Kung 1978; Moore 1981),
  `A = U_above^T U_below`, always stable, but a filter that has not decayed at N has no exact low
  rank any more;
- half, every entry a sample: A by least squares (Ho and Kalman 1966; Kung 1978), exact for a sum of
  exponentials, but the poles of other filters may leave the unit circle and are pulled back.

Axis letters: F filters, K modes, N samples, E eigenvalues.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Complex128, Float64

from jaxinfer.distill.filters.modes import NO_MODES, Modes, reduce, solve_residues
from jaxinfer.distill.filters.spectrum import Spectrum, half, hankel_spectrum, zero_padded

RANK = 1e-13
"""Singular values below this share of the first are roundings, in float64."""


def slowest(samples: int) -> float:
    """The least decay per step that samples can tell: a radius of at most 1 - 1e-4, or nearer to 1
    where that would fade by a tenth within them."""
    return min(1e-4, 0.1 / samples)


def balanced_modes(g: Float64[np.ndarray, "F N"], count: int) -> list[Modes]:
    """At most `count` modes of each filter by balanced truncation, residues by least squares."""
    spectrum = hankel_spectrum(g, zero_padded(g.shape[1]), 2 * count)
    return _modes(g, spectrum, count, lambda above, below: above.T @ below)


def half_hankel_modes(g: Float64[np.ndarray, "F N"], count: int) -> list[Modes]:
    """The same from the half Hankel matrix, A by least squares."""
    spectrum = hankel_spectrum(g, half(g.shape[1]), 2 * count)
    return _modes(g, spectrum, count, lambda above, below: np.linalg.lstsq(above, below)[0])


def stable(poles: Complex128[np.ndarray, " E"], samples: int) -> Complex128[np.ndarray, " K"]:
    """One pole of each conjugate pair, and real poles, none nearer to the circle than `slowest`."""
    poles = poles[np.imag(poles) >= 0]
    radius = np.abs(poles)
    return poles * (np.minimum(radius, np.exp(-slowest(samples))) / np.where(radius, radius, 1))


def _modes(g, spectrum: Spectrum, count: int, invariance: Callable) -> list[Modes]:
    found = []
    for target, values, vectors in zip(g, spectrum.values, spectrum.vectors, strict=True):
        order = min(2 * count, int((values > RANK * values[0]).sum()))
        if order == 0:
            found.append(NO_MODES)
            continue
        leading = vectors[:, :order]
        poles = np.linalg.eigvals(invariance(leading[:-1], leading[1:])).astype(complex)
        modes = solve_residues(stable(poles, len(target)), target)
        found.append(reduce(modes, target, count))
    return found
