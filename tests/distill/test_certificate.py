"""Lower bounds never exceed an achieved error (laughing_hyena.md 5.3)."""

import numpy as np
import pytest
import scipy.linalg

from jaxinfer.distill.filters.baselines import modal_truncation, prony
from jaxinfer.distill.filters.certificate import error_bounds
from jaxinfer.distill.filters.dictionary import dictionary_modes
from jaxinfer.distill.filters.modes import solve_residues, stack
from jaxinfer.distill.filters.realize import balanced_modes, half_hankel_modes
from jaxinfer.nn.modal import exact_response
from tests.distill.filter_banks import hyena_filters, sums_of_modes

METHODS = (balanced_modes, half_hankel_modes, modal_truncation, prony, dictionary_modes)


def banks(lags: int):
    """Filters of many kinds."""
    random = np.random.default_rng(3)
    _, _, sums = sums_of_modes(3, 12, lags, seed=5)
    noise = random.normal(size=(2, lags))
    delay = np.eye(1, lags, 9)
    slow = np.exp(-1e-4 * np.arange(lags))[None] + np.eye(1, lags, 3)
    return np.concatenate([hyena_filters(lags, channels=3), sums, noise, delay, slow])


@pytest.mark.parametrize("lags", [64, 240])
def test_no_method_beats_the_bounds(lags):
    g = banks(lags)[:, 1:]
    for count in (1, 6):
        bounds = error_bounds(g, 2 * count)
        assert (bounds.l2 > 0).any()
        for method in METHODS:
            error = exact_response(stack(method(g, count), count), lags)[:, 1:] - g
            assert (np.linalg.norm(error, axis=1) >= bounds.l2).all(), method
            norms = [np.linalg.norm(scipy.linalg.hankel(row), 2) for row in error]
            assert (np.array(norms) >= bounds.hankel).all(), method


def test_no_random_poles_beat_the_bound():
    random = np.random.default_rng(0)
    g = hyena_filters(48, channels=2)[:, 1:]
    bounds = error_bounds(g, 4).l2
    norm = np.linalg.norm(g, axis=1)
    assert (bounds > 0.04 * norm).all()
    for _ in range(200):
        poles = random.uniform(0, 1, 2) * np.exp(1j * random.uniform(0, np.pi, 2))
        for row, bound in zip(g, bounds, strict=True):
            modes = solve_residues(poles, row)
            found = exact_response(stack([modes], 2), 48)[0, 1:]
            assert np.linalg.norm(found - row) >= bound


def test_bounds_vanish_where_an_exact_model_exists():
    _, _, h = sums_of_modes(3, 4, 128)
    bounds = error_bounds(h[:, 1:], 8)
    assert (bounds.l2 == 0).all() and (bounds.hankel == 0).all()
    assert (error_bounds(h[:, 1:], 6).l2 > 0).all()


def test_a_delay_cannot_be_had_with_fewer_states():
    # laughing_hyena.md 5.6 (a): sigma_(n+1) = sigma_1 for n below the lag
    g = np.eye(1, 255, 15)
    for order in (8, 14):
        assert error_bounds(g, order).hankel[0] == pytest.approx(1)
    assert error_bounds(g, 16).hankel[0] == 0


def test_the_error_in_hankel_norm_is_at_least_the_next_singular_value():
    # laughing_hyena.md 5.3, with the model's own tail behind the samples
    g = hyena_filters(128, channels=8)[-1:, 1:]  # the fastest-fading channel
    values = scipy.linalg.svdvals(scipy.linalg.hankel(g[0]))
    for order in (4, 8, 16):
        model = stack(balanced_modes(g, order // 2), order // 2)
        long = np.pad(g, ((0, 0), (0, 384))) - exact_response(model, 512)[:, 1:]
        achieved = np.linalg.norm(scipy.linalg.hankel(long[0])[:256, :256], 2)
        assert achieved >= 0.999 * values[order]
        assert order == 16 or achieved < 2 * values[order]
