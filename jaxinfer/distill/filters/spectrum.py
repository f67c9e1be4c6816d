"""Singular values and vectors of Hankel matrices `H_ij = g_(i+j)`, never formed when large.

Products with a Hankel matrix are correlations, so an FFT makes them; a few steps of randomised
subspace iteration (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4) find the leading
part of the spectrum. Filters are mapped over, in chunks of bounded memory.

Axis letters: F filters, N samples (zeros follow them), M rows, J columns, R singular values.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

DENSE = 256
"""The side of a matrix that is still decomposed whole."""

OVERSAMPLING = 16
BLOCK = 32  # of columns, so that ranks share programs
POWER_STEPS = 4  # two leave a visible error in the fit
CHUNK = 8  # filters at once, always as many, so that banks share programs
MEMORY = 2**28  # bytes of a chunk's Fourier transforms


@dataclass(frozen=True)
class Hankel:
    """A kind of Hankel matrix.

    `weighted` multiplies row and column i by the square root of w_i, where `sum w_i z^i =
    (1 - z)^(-1/2)`. The weights of an antidiagonal, `sum_(i+j=t) w_i w_j`, then add up to one as
    long as it does not leave the matrix, to less where it does.
    """

    rows: int
    columns: int
    weighted: bool = False

    def weights(self, count: int, dtype: np.dtype) -> Float[np.ndarray, " N"]:
        """Factors of the first `count` rows or columns."""
        if not self.weighted:
            return np.ones(count, dtype)
        i = np.arange(1, count)
        return np.sqrt(np.cumprod(np.concatenate([[1.0], (i - 0.5) / i]))).astype(dtype)

    def dense(self, g: Float[np.ndarray, "F N"]) -> Float[np.ndarray, "F M J"]:
        """The matrices themselves."""
        missing = max(0, self.rows + self.columns - 1 - g.shape[1])
        index = np.arange(self.rows)[:, None] + np.arange(self.columns)
        left, right = (self.weights(n, g.dtype) for n in (self.rows, self.columns))
        return np.pad(g, ((0, 0), (0, missing)))[:, index] * left[:, None] * right


def zero_padded(samples: int) -> Hankel:
    """Zeros follow the samples."""
    return Hankel(samples, samples)


def half(samples: int, *, weighted: bool = False) -> Hankel:
    """Every entry is a sample, and every sample an entry."""
    rows = (samples + 1) // 2
    return Hankel(rows, samples + 1 - rows, weighted)


class Spectrum(NamedTuple):
    """The leading singular values, falling, and left singular vectors."""

    values: Float[np.ndarray, "F R"]
    vectors: Float[np.ndarray, "F M R"]


def hankel_spectrum(
    g: Float[np.ndarray, "F N"], kind: Hankel, rank: int, seed: int = 0
) -> Spectrum:
    """The `rank` largest singular values of each filter's Hankel matrix, with left vectors.

    In the dtype of `g`. The values of a large matrix are Ritz values: never above the true ones.
    """
    side = min(kind.rows, kind.columns)
    rank = min(rank, side)
    if side <= DENSE or rank + OVERSAMPLING + BLOCK > side:
        vectors, values, _ = np.linalg.svd(kind.dense(g), full_matrices=False)
        return Spectrum(values[:, :rank], vectors[:, :, :rank])
    width = -(-(rank + OVERSAMPLING) // BLOCK) * BLOCK
    chunk = max(1, min(CHUNK, MEMORY // (width * _fft_size(kind.rows, kind.columns) * 16)))
    parts = []
    with jax.enable_x64(g.dtype == np.float64):
        start = jax.random.normal(jax.random.key(seed), (kind.columns, width), dtype=g.dtype)
        for first in range(0, len(g), chunk):
            rows = np.minimum(np.arange(first, first + chunk), len(g) - 1)
            values, vectors = _randomized(jnp.asarray(g[rows]), start, kind)
            count = min(chunk, len(g) - first)
            parts.append((np.asarray(values)[:count], np.asarray(vectors)[:count]))
    values, vectors = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Spectrum(values[:, :rank], vectors[:, :, :rank])


def hankel_product(g: Float[Array, " N"], x: Float[Array, "J R"], rows: int) -> Float[Array, "M R"]:
    """`H x` of the unweighted matrix with `rows` rows: the correlation of g with each column."""
    size = _fft_size(rows, x.shape[0])
    spectrum = jnp.fft.rfft(g[: rows + x.shape[0] - 1], size)[:, None]
    return jnp.fft.irfft(spectrum * jnp.fft.rfft(x, size, axis=0).conj(), size, axis=0)[:rows]


def _fft_size(rows: int, columns: int) -> int:
    return 1 << (rows + columns - 2).bit_length()


@partial(jax.jit, static_argnames="kind")
def _randomized(g, start, kind: Hankel):
    """Values and left vectors of a chunk, by subspace iteration from the columns of `start`."""
    left, right = (kind.weights(n, g.dtype)[:, None] for n in (kind.rows, kind.columns))

    def one(g):
        def across(x):
            return left * hankel_product(g, right * x, kind.rows)

        def back(x):
            return right * hankel_product(g, left * x, kind.columns)

        def orthonormal(x):
            return jnp.linalg.qr(x)[0]

        def step(_, basis):
            return orthonormal(across(orthonormal(back(basis))))

        basis = jax.lax.fori_loop(0, POWER_STEPS, step, orthonormal(across(start)))
        # What remains is basis^T H, long in one direction only: its QR makes the SVD small.
        triangle = jnp.linalg.qr(back(basis), mode="r")
        inner, values, _ = jnp.linalg.svd(triangle.T, full_matrices=False)
        return values, basis @ inner

    return jax.vmap(one)(g)
