"""Older ways to a filter of K modes, to compare with.

Axis letters: F filters, K modes, N samples.
"""

import numpy as np
from jaxtyping import Float64

from jaxinfer.distill.filters.modes import Modes, reduce, solve_residues
from jaxinfer.distill.filters.realize import balanced_modes, stable

SURPLUS = 4  # times the modes asked for, from which modal truncation takes


def modal_truncation(g: Float64[np.ndarray, "F N"], count: int) -> list[Modes]:
    """The `count` modes with the largest gain |R| / (1 - |lambda|) of a model four times as large,
    their residues as they are."""
    most = min(SURPLUS * count, g.shape[1] // 2)
    found = []
    for modes in balanced_modes(g, most):
        gain = np.abs(modes.residues) / (1 - np.abs(modes.poles))
        found.append(modes.keep(np.sort(np.argsort(-gain)[:count])))
    return found


def prony(g: Float64[np.ndarray, "F N"], count: int) -> list[Modes]:
    """Linear prediction from 2 K samples by least squares; the predictor's roots are the poles.
    Exact for exact sums, lost with a little noise."""
    order = 2 * count
    found = []
    for target in g:
        windows = np.lib.stride_tricks.sliding_window_view(target, order)[:-1]
        ahead = np.linalg.lstsq(windows[:, ::-1], target[order:], rcond=None)[0]
        found.append(modes_of_denominator(np.concatenate([[1.0], -ahead]), target, count))
    return found


def modes_of_denominator(denominator: np.ndarray, target: np.ndarray, count: int) -> Modes:
    """The modes whose poles are the roots of `sum_i c_i z^-i`."""
    poles = stable(np.roots(denominator).astype(complex), len(target))
    return reduce(solve_residues(poles, target), target, count)
