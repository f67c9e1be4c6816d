"""How spread attention is and how low a rank matrices have, against NumPy: joma.md 10.9."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.theory.measures.attention import (
    effective_keys,
    entropy,
    heavy_hitter_overlap,
    relative_entropy,
    sink_mass,
    top_mass,
)
from jaxinfer.theory.measures.correlation import normalised_correlation
from jaxinfer.theory.measures.spectrum import effective_rank, largest_singular_value, stable_rank

SPECTRUM = [jax.jit(f) for f in (largest_singular_value, stable_rank, effective_rank)]
RNG = np.random.default_rng(0)


@pytest.mark.parametrize("library", [np, jnp])
def test_10_9_uniform_causal_attention_of_length_35(library):
    weights = library.asarray(np.tri(35) / np.arange(1, 36)[:, None])
    keys = library.arange(1, 36)
    assert float(entropy(weights).mean()) == pytest.approx(2.632, abs=5e-4)
    relative = np.asarray(relative_entropy(weights, keys))
    np.testing.assert_allclose(relative, [0, *np.ones(34)], atol=1e-6)
    np.testing.assert_allclose(effective_keys(weights), np.arange(1, 36), rtol=1e-5)
    np.testing.assert_allclose(sink_mass(weights)[-1], 4 / 35, rtol=1e-6)
    np.testing.assert_allclose(top_mass(weights, 16)[-1], 16 / 35, rtol=1e-6)
    np.testing.assert_allclose(top_mass(weights, 64), 1, rtol=1e-6)


def test_heavy_hitters_that_stay_are_counted():
    first, second = RNG.permutation(40.0 * np.arange(20)), np.arange(20.0)
    assert heavy_hitter_overlap(first, first) == 1
    expected = len({*np.argsort(-first)[:2]} & {18, 19}) / 2
    assert heavy_hitter_overlap(first, second) == expected
    assert heavy_hitter_overlap(np.array([3.0, 1.0]), np.array([1.0, 3.0])) == 0


def test_10_9_stable_rank_of_the_identity_and_of_rank_one():
    one = np.zeros((40, 40), np.float32)
    one[:, :] = np.outer(RNG.normal(size=40), RNG.normal(size=40))
    _, stable, effective = SPECTRUM
    eye = np.eye(40, dtype=np.float32)
    assert float(stable(eye)) == pytest.approx(40, rel=1e-6)
    assert float(effective(eye)) == pytest.approx(40, rel=1e-5)
    assert float(stable(one)) == pytest.approx(1, rel=1e-5)
    assert float(effective(one)) == pytest.approx(1, abs=1e-4)
    assert float(stable(0 * one)) == float(effective(0 * one)) == 0
    assert np.isfinite(float(stable(1e30 * eye)))


@pytest.mark.parametrize("decay", [None, 0.02, 0.3])
def test_10_9_ranks_are_those_of_the_singular_values(decay):
    matrix = RNG.normal(size=(40, 40))  # as at initialisation: close values at the upper end
    if decay is not None:
        u, _, v = np.linalg.svd(matrix)
        matrix = u * np.exp(-decay * np.arange(40)) @ v
    matrix = matrix.astype(np.float32)
    s = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    top, stable, effective = (float(f(matrix)) for f in SPECTRUM)
    shares = s / s.sum()
    assert top == pytest.approx(s[0], rel=5e-4)
    assert stable == pytest.approx((s**2).sum() / s[0] ** 2, rel=1e-3)
    assert effective == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-4)


def test_correlation_hides_scale_and_offset():
    a = RNG.normal(size=9)
    assert normalised_correlation(a, 1000 * a + 5) == pytest.approx(1)
    assert normalised_correlation(a, -a) == pytest.approx(-1)
    assert normalised_correlation(a, np.ones(9)) == 0
    both = np.stack([a, RNG.normal(size=9)])
    expected = np.corrcoef(both)
    np.testing.assert_allclose(normalised_correlation(both[:, None], both[None]), expected)
