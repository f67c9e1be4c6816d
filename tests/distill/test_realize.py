"""Poles from Hankel matrices, residues by least squares, against exact sums and SciPy."""

import numpy as np
import pytest
import scipy.signal

from jaxinfer.distill.filters.baselines import modal_truncation, prony
from jaxinfer.distill.filters.dictionary import _captured, dictionary_modes
from jaxinfer.distill.filters.modes import (
    Modes,
    is_real,
    order,
    powers,
    reduce,
    shared_residues,
    solve_residues,
    stack,
    unstack,
)
from jaxinfer.distill.filters.realize import balanced_modes, half_hankel_modes, slowest, stable
from jaxinfer.distill.filters.spectrum import half, hankel_spectrum
from tests.distill.filter_banks import hyena_filters, sums_of_modes


def relative(modes: list[Modes], g: np.ndarray) -> np.ndarray:
    fitted = np.stack([(powers(one.poles, g.shape[1]) @ one.residues).real for one in modes])
    return np.linalg.norm(fitted - g, axis=1) / np.linalg.norm(g, axis=1)


def test_half_hankel_recovers_exact_sums():
    # laughing_hyena.md 5.1: below 1e-10 in float64; balanced truncation alone cannot, tails are cut
    poles, _, h = sums_of_modes(8, 4, 512)
    g = h[:, 1:]
    found = half_hankel_modes(g, 4)
    assert relative(found, g).max() < 1e-10
    for one, true in zip(found, poles, strict=True):
        assert np.abs(np.sort_complex(one.poles) - np.sort_complex(true)).max() < 1e-9
    _, _, slow = sums_of_modes(8, 4, 512, least=0.985)
    assert relative(half_hankel_modes(slow[:, 1:], 4), slow[:, 1:]).max() < 1e-10
    assert np.median(relative(balanced_modes(slow[:, 1:], 4), slow[:, 1:])) > 1e-4


def test_half_hankel_recovers_sums_from_float32_vectors():
    # laughing_hyena.md 5.1: below 1e-5 with singular vectors in float32
    _, _, h = sums_of_modes(8, 4, 512)
    g = h[:, 1:]
    spectrum = hankel_spectrum(g.astype(np.float32), half(511), 8)
    for row, vectors in zip(g, spectrum.vectors.astype(float), strict=True):
        ahead = np.linalg.lstsq(vectors[:-1], vectors[1:])[0]
        modes = solve_residues(stable(np.linalg.eigvals(ahead).astype(complex), 511), row)
        assert relative([modes], row[None]) < 1e-5


@pytest.mark.parametrize("method", [prony, half_hankel_modes])
def test_prony_is_exact_without_noise_only(method):
    # laughing_hyena.md 2.8: 3.6 % at 0.1 % noise where the half Hankel keeps 0.018 %
    _, _, h = sums_of_modes(4, 3, 256)
    g = h[:, 1:]
    assert relative(method(g, 3), g).max() < 1e-8
    random = np.random.default_rng(0)
    noise = random.normal(size=g.shape)
    noise *= (
        1e-3 * np.linalg.norm(g, axis=1, keepdims=True) / np.linalg.norm(noise, axis=1)[:, None]
    )
    error = np.median(relative(method(g + noise, 3), g))
    assert error > 2e-3 if method is prony else error < 5e-4


def test_modes_are_the_impulse_response_of_their_state_space():
    modes = Modes(np.array([0.9 * np.exp(0.4j), 0.7 + 0j]), np.array([1 - 2j, 0.5 + 0j]))
    pole, residue = modes.poles[0], modes.residues[0]
    a = np.zeros((3, 3))
    a[:2, :2] = [[pole.real, -pole.imag], [pole.imag, pole.real]]
    a[2, 2] = 0.7
    system = (
        a,
        np.array([[1.0], [0], [1]]),
        np.array([[residue.real, -residue.imag, 0.5]]),
        [[0.0]],
    )
    _, (response,) = scipy.signal.dimpulse((*system, 1), n=40)
    fitted = (powers(modes.poles, 39) @ modes.residues).real
    assert np.abs(response[1:, 0] - fitted).max() < 1e-14 and response[0, 0] == 0


def test_the_spectrum_of_cut_modes_has_the_correction():
    # laughing_hyena.md 5.3: 1e-12 with (1 - lambda^N), 5e-2 without
    poles, residues, h = sums_of_modes(4, 4, 257, least=0.98, most=0.999)
    z = np.exp(2j * np.pi * np.arange(256) / 256)
    folded = []
    for pole, residue, row in zip(poles, residues, h[:, 1:], strict=True):
        pole, residue = np.append(pole, pole.conj()), np.append(residue, residue.conj()) / 2
        bare = residue / (1 - pole / z[:, None])
        cut = (bare * (1 - pole**256)).sum(axis=1)
        scale = np.abs(cut).max()
        assert np.abs(np.fft.fft(row) - cut).max() < 1e-12 * scale
        folded.append(np.abs(np.fft.fft(row) - bare.sum(axis=1)).max() / scale)
    assert max(folded) > 1e-2


def test_poles_stay_inside_what_samples_can_tell():
    poles = np.array([1.02 + 0j, -1.5, 0.3 + 0.2j, 0.3 - 0.2j, 1.1j, -1.1j, 0])
    found = stable(poles, 511)
    assert len(found) == 5 and np.abs(found).max() <= np.exp(-slowest(511))
    assert found[2] == 0.3 + 0.2j and np.allclose(np.angle(found), np.angle(poles[[0, 1, 2, 4, 6]]))
    assert slowest(100_000) < 1e-5  # slow modes of long filters are not cut


def test_real_poles_are_one_state_even_where_float32_has_no_pi():
    g = np.random.default_rng(0).normal(size=(1, 30))
    modes = solve_residues(np.array([-0.5 + 0j, 0.5 + 0j, 0.5j]), g[0])
    assert modes.residues[:2].imag.tolist() == [0, 0] and modes.residues[2].imag != 0
    (held,) = unstack(stack([modes], 4))
    assert is_real(held.poles).tolist() == [True, True, False] and order(held) == 4


def test_the_weakest_modes_go_first():
    poles = np.array([0.9j, 0.8, 0.5 + 0.5j])
    g = (powers(poles, 60) @ np.array([1, 1e-3, 2])).real
    left = reduce(solve_residues(poles, g), g, 2)
    assert left.poles.tolist() == [0.9j, 0.5 + 0.5j]
    assert reduce(left, g, 5) is left


def test_modal_truncation_keeps_the_largest_gains():
    g = hyena_filters(200, channels=2)[:, 1:]
    (before, after) = balanced_modes(g, 8), modal_truncation(g, 2)
    for large, small in zip(before, after, strict=True):
        gains = np.abs(large.residues) / (1 - np.abs(large.poles))
        assert set(small.poles) == set(large.poles[np.argsort(gains)[-2:]])


def test_poles_of_a_dictionary_are_shared_and_take_the_most():
    g = hyena_filters(128, channels=3)[:, 1:]
    found = dictionary_modes(g, 5)
    assert all(np.array_equal(one.poles, found[0].poles) for one in found)
    errors = [relative(dictionary_modes(g, count), g).mean() for count in (1, 3, 5)]
    assert errors[0] > errors[1] > errors[2]
    poles = np.array([0.9 * np.exp(0.3j), 0.8 + 0j, -0.95 + 0j])
    turned = g @ (powers(poles.conj(), 127))
    captured = _captured(turned, poles, 127)
    for index, pole in enumerate(poles):
        residues = shared_residues(poles[[index]], g)
        rest = g - (residues @ powers(np.array([pole]), 127).T).real
        taken = np.linalg.norm(g, axis=1) ** 2 - np.linalg.norm(rest, axis=1) ** 2
        assert np.allclose(captured[:, index], taken, rtol=1e-9)
