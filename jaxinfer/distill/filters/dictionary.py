"""Poles from a fixed dictionary, the same for all filters of a bank, chosen without training.

SpectraLDS (arXiv 2505.17868) distils spectral filters by orthogonal matching pursuit over some
10,000 real poles. Here poles are complex: decays of 1, 1/2, 1/4, ... down to what the samples can
tell, each at every angle of a Fourier grid, about 12 N in all. So the correlations of what remains
with one decay's modes are one FFT of the remainder times r^s. A step takes the pole that captures
most of all filters' remaining energy, then solves all residues again.

Axis letters: F filters, K modes, N samples, A angles.
"""

import numpy as np
from jaxtyping import Complex128, Float64

from jaxinfer.distill.filters.modes import Modes, powers, shared_residues
from jaxinfer.distill.filters.realize import slowest


def dictionary_modes(g: Float64[np.ndarray, "F N"], count: int) -> list[Modes]:
    """`count` modes of each filter, whose poles all filters share."""
    poles = np.zeros(0, complex)
    residues = np.zeros((len(g), 0), complex)
    for _ in range(count):
        remainder = g - np.real(residues @ powers(poles, g.shape[1]).T)
        poles = np.append(poles, _best_pole(remainder))
        residues = shared_residues(poles, g)
    return [Modes(poles, row) for row in residues]


def _best_pole(remainder: Float64[np.ndarray, "F N"]) -> complex:
    samples = remainder.shape[1]
    size = 1 << samples.bit_length()
    angles = np.arange(size // 2 + 1) * (2 * np.pi / size)
    best, pole = -1.0, 0j
    for radius in _radii(samples):
        turned = np.fft.rfft(remainder * radius ** np.arange(samples), size)
        captured = _captured(turned, radius * np.exp(1j * angles), samples).sum(axis=0)
        index = int(np.argmax(captured))
        if captured[index] > best:
            best, pole = captured[index], radius * np.exp(1j * angles[index])
    return complex(pole)


def _radii(samples: int) -> Float64[np.ndarray, " N"]:
    levels = int(np.ceil(np.log2(1 / slowest(samples)))) + 1
    return np.exp(-np.maximum(0.5 ** np.arange(levels), slowest(samples)))


def _captured(
    turned: Complex128[np.ndarray, "F A"], poles: Complex128[np.ndarray, " A"], samples: int
) -> Float64[np.ndarray, "F A"]:
    """The energy that each pole's mode takes from each filter: the projection on its two columns
    r^s cos, r^s sin, whose products are geometric series."""
    whole = np.real(_series(np.abs(poles) ** 2, samples))
    double = _series(poles**2, samples)
    cos_cos, sin_sin, cos_sin = (
        (whole + np.real(double)) / 2,
        (whole - np.real(double)) / 2,
        np.imag(double) / 2,
    )
    cos, sin = np.real(turned), -np.imag(turned)
    determinant = cos_cos * sin_sin - cos_sin**2
    both = sin_sin * cos**2 - 2 * cos_sin * cos * sin + cos_cos * sin**2
    single = determinant < 1e-9 * whole**2  # a real pole's sine is none
    return np.where(single, cos**2 / cos_cos, both / np.where(single, 1, determinant))


def _series(ratio: np.ndarray, samples: int) -> Complex128[np.ndarray, " A"]:
    return ((1 - ratio**samples) / (1 - ratio)).astype(complex)
