"""What no model of an order can beat: lower bounds of errors from singular values.

A model of order n has a Hankel matrix of rank n at most, so that the Hankel matrix of its error e
keeps what a matrix of rank n cannot remove: `||H(e)||_F^2 >= sum_(i>n) sigma_i^2` (Eckart and
Young), and its largest singular value is at least sigma_(n+1). In the half matrix every entry is a
sample, each at most J times with J its smaller side, hence `||e||^2 >= sum_(i>n) sigma_i^2 / J`.
Weights keep ranks, and with those of `Hankel` a sample counts once at most: `||e||^2 >= sum_(i>n)
sigma_i^2` of the weighted matrix, about twice the first bound for filters that fade. Adamjan, Arov
and Krein give the best error in Hankel norm, which is no bound in l2 (arXiv 2310.18780 uses it to
choose the order).

Singular values that are Ritz values lie below the true ones, and those behind the computed ones
count as zero: a bound can only become lower.

Axis letters: F filters, N samples.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from jaxinfer.distill.filters.spectrum import half, hankel_spectrum

ROUNDING = 1e-13
"""Singular values below this share of the first prove nothing."""

BEHIND = 48  # singular values behind the order that are added up


class Bounds(NamedTuple):
    """Lower bounds of the error of any stable or unstable model of an order, per filter."""

    l2: Float64[np.ndarray, " F"]
    hankel: Float64[np.ndarray, " F"]  # of the error's Hankel norm


def error_bounds(g: Float64[np.ndarray, "F N"], order: int) -> Bounds:
    """The bounds for `order` real states."""
    samples = g.shape[1]
    kind = half(samples)
    plain, weighted = (
        _tail(hankel_spectrum(g, one, order + BEHIND).values, order)
        for one in (kind, half(samples, weighted=True))
    )
    plain_l2 = np.linalg.norm(plain, axis=1) / np.sqrt(min(kind.rows, kind.columns))
    l2 = np.maximum(plain_l2, np.linalg.norm(weighted, axis=1))
    return Bounds(l2, plain[:, 0] if plain.shape[1] else np.zeros(len(g)))


def _tail(values: np.ndarray, order: int) -> np.ndarray:
    return np.where(values > ROUNDING * values[:, :1], values, 0.0)[:, order:]
