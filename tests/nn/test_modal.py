"""Modal filters: precise at far lags, stable, and one filter in each of their forms."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.nn.modal import (
    ModalFilter,
    exact_response,
    from_undelayed,
    impulse_response,
    modal_filter,
    undelayed,
)
from jaxinfer.testing.quick import QUICK

jit = functools.partial(jax.jit, compiler_options=QUICK)
response = jit(impulse_response, static_argnums=1)


def some_filters(radius: tuple[float, float] = (0.9, 0.99), taps: int = 0) -> ModalFilter:
    """Five filters of four modes, angles on both sides of zero and real poles among them."""
    rng = np.random.default_rng(0)
    angles = rng.uniform(-np.pi, np.pi, (5, 4))
    angles[0, :2] = 0.0, np.pi
    poles = rng.uniform(*radius, (5, 4)) * np.exp(1j * angles)
    residues = rng.standard_normal((5, 4)) + 1j * rng.standard_normal((5, 4))
    more = rng.standard_normal((5, taps)) if taps else None
    return modal_filter(poles, residues, rng.standard_normal(5), more)


@pytest.mark.parametrize(("taps", "length"), [(0, 1), (3, 2), (3, 4), (0, 700), (3, 700)])
def test_the_response_is_that_of_the_recurrence(taps, length):
    filters = some_filters(taps=taps)
    state, inputs, expected = np.zeros((5, 4), complex), np.eye(1, length)[0], []
    past = np.zeros(taps)
    for u in inputs:
        entering = np.concatenate([past, [u]])[0]  # modes see an input `taps` steps later
        y = filters.h0 * u + (0 if not taps else np.asarray(filters.taps) @ past[::-1])
        expected.append(y + (filters.residues() * state).real.sum(axis=1))
        state = filters.poles() * state + entering
        past = np.concatenate([past, [u]])[1:] if taps else past
    np.testing.assert_allclose(exact_response(filters, length), np.stack(expected, 1), atol=1e-12)
    found = response(filters, length)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, np.stack(expected, 1), atol=5e-6)


def test_far_lags_keep_their_phase():
    """laughing_hyena.md 4.3: a float32 product of lag and angle is wrong by 3e-3 at 32,000."""
    filters = some_filters((1 - 1e-5, 1 - 1e-5))
    exact = exact_response(filters, 32768)
    found = np.asarray(response(filters, 32768))
    assert np.abs(found - exact).max() < 1e-4 * np.abs(exact).max()
    assert np.abs(found - exact)[:, :2000].max() < 1e-5 * np.abs(exact).max()


@jit
def gradient(filters: ModalFilter, wanted):
    return jax.grad(lambda f: (impulse_response(f, wanted.shape[1]) * wanted).sum())(filters)


def test_gradients_are_those_of_the_formula():
    """Also through the integers that count turns; the formula alone in float32, few lags."""
    filters = some_filters(taps=2)
    wanted = jnp.asarray(np.random.default_rng(1).standard_normal((5, 40)), jnp.float32)

    def plain(f: ModalFilter):
        pole = jnp.exp(-jnp.exp(f.nu) + 1j * f.theta)
        modes = ((f.a + 1j * f.b)[..., None] * pole[..., None] ** jnp.arange(37)).real.sum(axis=1)
        return (jnp.concatenate([f.h0[:, None], f.taps, modes], axis=1) * wanted).sum()

    expected, found = jit(jax.grad(plain))(filters), gradient(filters, wanted)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), found, expected
    )
    # laughing_hyena.md 5.4: no NaN with a radius near 0 or 1.
    ends = replace(filters, nu=jnp.asarray([[-30.0, -16, 5, 30]] * 5))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient(ends, wanted)))
    assert np.abs(ends.poles()).max() <= 1


def test_delayed_and_undelayed_forms_are_one_filter():
    """laughing_hyena.md 5.3: to 1e-12 but for the rounding of the leaves."""
    filters = some_filters()
    poles, residues, skip = undelayed(filters)
    lags = np.arange(100)
    h = (residues[..., None] * poles[..., None] ** lags).real.sum(axis=1)
    h[:, 0] += skip
    np.testing.assert_allclose(h, exact_response(filters, 100), atol=1e-12)
    back = from_undelayed(poles, residues, skip)
    np.testing.assert_allclose(back.poles(), filters.poles(), atol=1e-6)
    np.testing.assert_allclose(back.residues(), filters.residues(), atol=1e-6)
    np.testing.assert_allclose(back.h0, filters.h0, atol=1e-6)


def test_what_is_no_filter_is_refused():
    filters = some_filters()
    poles, residues, h0 = filters.poles(), filters.residues(), np.zeros(5)
    with pytest.raises(ValueError, match="2 of 20 poles are not inside the unit circle"):
        outside = poles.copy()
        outside[0, :2] = 1.0, 1.001j
        modal_filter(outside, residues, h0)
    with pytest.raises(ValueError, match="residues holds numbers that are not finite"):
        modal_filter(poles, residues * np.nan, h0)
    with pytest.raises(ValueError, match="nu must be float32, got bfloat16; keep filters out"):
        replace(filters, nu=filters.nu.astype(jnp.bfloat16)).check()
    with pytest.raises(ValueError, match=r"b must be \[5, 4\], got \[5, 3\]"):
        replace(filters, b=filters.b[:, :3]).check()
    with pytest.raises(ValueError, match="the undelayed form has no taps"):
        undelayed(some_filters(taps=1))
    with pytest.raises(ValueError, match="a pole has radius 1e-09; the undelayed form divides"):
        undelayed(modal_filter(poles * 1e-9 / np.abs(poles), residues, h0))
