"""Hankel spectra by FFT against SciPy's dense matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from jaxinfer.distill.filters import spectrum
from jaxinfer.distill.filters.spectrum import (
    Hankel,
    half,
    hankel_product,
    hankel_spectrum,
    zero_padded,
)
from tests.distill.filter_banks import hyena_filters


def tail(lags: int) -> np.ndarray:
    return hyena_filters(lags, channels=2)[:, 1:]


def test_matrices_are_scipys():
    g = tail(40)[0]
    whole = scipy.linalg.hankel(g)
    assert np.array_equal(zero_padded(39).dense(g[None])[0], whole)
    kind = half(39)
    assert np.array_equal(kind.dense(g[None])[0], whole[: kind.rows, : kind.columns])
    assert kind.rows + kind.columns == 40


@pytest.mark.parametrize("kind", [zero_padded(39), half(39), Hankel(10, 30)])
def test_products_by_fft_are_those_of_the_matrix(kind):
    g, x = tail(40)[0], np.random.default_rng(0).normal(size=(kind.columns, 3))
    with jax.enable_x64(True):
        found = np.asarray(hankel_product(jnp.asarray(g), jnp.asarray(x), kind.rows))
    assert np.abs(found - kind.dense(g[None])[0] @ x).max() < 1e-14 * np.abs(g).sum()


def test_weights_of_an_antidiagonal_add_up_to_one():
    weights = Hankel(50, 50, weighted=True).weights(50, np.dtype(float)) ** 2
    sums = np.convolve(weights, weights)
    assert np.abs(sums[:50] - 1).max() < 1e-12 and (sums[50:] < 1).all()


def test_randomised_values_are_those_of_the_whole_matrix():
    # laughing_hyena.md 5.3: within 5e-3 sigma_1 (n = 32, 4 steps), here at 512 lags
    check_against_whole(512)


@pytest.mark.slow
def test_randomised_values_at_2048_lags():
    check_against_whole(2048)


def check_against_whole(lags: int) -> None:
    g = tail(lags)
    found = hankel_spectrum(g, zero_padded(lags - 1), 32)
    whole = np.abs(np.stack([scipy.linalg.eigvalsh(scipy.linalg.hankel(row)) for row in g]))
    whole = np.sort(whole, axis=1)[:, :-33:-1]
    first = whole[:, :1]
    assert (np.abs(found.values - whole) < 5e-3 * first).all()
    assert (found.values <= whole + 1e-12 * first).all()  # Ritz values: never above
    gram = np.swapaxes(found.vectors, 1, 2) @ found.vectors
    assert np.abs(gram - np.eye(32)).max() < 1e-10


def test_chunks_change_nothing(monkeypatch):
    g = hyena_filters(512, channels=2)[:, 1:]
    together = hankel_spectrum(g, zero_padded(511), 32)
    monkeypatch.setattr(spectrum, "MEMORY", 1)
    alone = hankel_spectrum(g, zero_padded(511), 32)
    assert np.abs(together.values - alone.values).max() < 1e-12 * together.values.max()
