"""Modes of one filter on the host, in float64, and their residues by least squares.

Behind its direct samples a filter is `g_s = Re sum_k R_k lambda_k^s`, s = 0, 1, ... (arXiv
2310.18780, the delayed form). A real pole is one state of the real system, any other stands for a
conjugate pair, two states.

Axis letters: F filters, K modes, N samples.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Complex128, Float64

from jaxinfer.nn.modal import ModalFilter, modal_filter

DEAD_POLE = 0.5
"""Of modes that pad a filter to its layer's number of modes; their residues are zero."""

CONDITION = 1e-10
"""Of the least squares: singular values below this share of the largest count as none."""

REAL = 1e-6
"""Radians from the real axis within which a pole counts as real: the sine of so small an angle is
all rounding in float32 and would ask for huge residues. (float32 has no exact pi, either.)"""


class Modes(NamedTuple):
    """Poles and residues of one filter."""

    poles: Complex128[np.ndarray, " K"]
    residues: Complex128[np.ndarray, " K"]

    @property
    def energy(self) -> Float64[np.ndarray, " K"]:
        """|R|^2 / (1 - |lambda|^2), that of each mode alone over all time."""
        return np.abs(self.residues) ** 2 / (1 - np.abs(self.poles) ** 2)

    def keep(self, which: np.ndarray) -> "Modes":
        """Some of them, by index or by mask."""
        return Modes(self.poles[which], self.residues[which])


NO_MODES = Modes(np.zeros(0, complex), np.zeros(0, complex))


def order(modes: Modes) -> int:
    """Real states: one of a real pole, two of any other."""
    return 2 * len(modes.poles) - int(is_real(modes.poles).sum())


def is_real(poles: Complex128[np.ndarray, " K"]) -> Bool[np.ndarray, " K"]:
    """Which poles are as good as real."""
    return np.abs(np.imag(poles)) <= REAL * np.abs(poles)


def powers(poles: Complex128[np.ndarray, " K"], samples: int) -> Complex128[np.ndarray, "N K"]:
    """`lambda^s`, as products of two short tables."""
    width = max(1, int(np.sqrt(samples)))
    fine = poles ** np.arange(width)[:, None]
    coarse = (poles**width) ** np.arange(-(-samples // width))[:, None]
    return (coarse[:, None] * fine).reshape(len(coarse) * width, len(poles))[:samples]


def solve_residues(poles: Complex128[np.ndarray, " K"], g: Float64[np.ndarray, " N"]) -> Modes:
    """The modes of these poles that are nearest to `g` in the l2 norm."""
    return Modes(poles, shared_residues(poles, g[None])[0])


def shared_residues(
    poles: Complex128[np.ndarray, " K"], g: Float64[np.ndarray, "F N"]
) -> Complex128[np.ndarray, "F K"]:
    """Residues of filters that have the same poles.

    Columns are scaled to one length, so that a mode that dies soon counts as much as a slow one.
    """
    table = powers(poles, g.shape[1])
    table = np.concatenate([np.real(table), -np.imag(table)], axis=1)
    scale = np.linalg.norm(table, axis=0)
    scale = np.where(np.append(np.ones(len(poles), bool), ~is_real(poles)), scale, np.inf)
    found = np.linalg.lstsq(table / scale, g.T, rcond=CONDITION)[0] / scale[:, None]
    real, imaginary = np.split(found, 2)
    return (real + 1j * imaginary).T


def reduce(modes: Modes, g: Float64[np.ndarray, " N"], count: int) -> Modes:
    """At most `count` modes: the weakest goes and the others' residues are solved, again and
    again."""
    while len(modes.poles) > count:
        weakest = np.argmin(modes.energy)
        modes = solve_residues(np.delete(modes.poles, weakest), g)
    return modes


def stack(modes: Sequence[Modes], count: int) -> ModalFilter:
    """Filters of `count` modes each, padded with dead ones, without direct samples (h_0 = 0)."""
    poles = np.full((len(modes), count), DEAD_POLE, complex)
    residues = np.zeros((len(modes), count), complex)
    for row, one in enumerate(modes):
        poles[row, : len(one.poles)], residues[row, : len(one.poles)] = one
    return modal_filter(poles, residues, np.zeros(len(modes)))


def unstack(filters: ModalFilter) -> list[Modes]:
    """The live modes of each filter."""
    pairs = zip(filters.poles(), filters.residues(), strict=True)
    return [Modes(poles, residues).keep(residues != 0) for poles, residues in pairs]
