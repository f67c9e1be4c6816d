"""Implicit filters, against their formulas written out in NumPy."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.hyena_config import FilterConfig, HyenaConfig
from jaxinfer.nn.filters import ImplicitFilter, features, window
from jaxinfer.nn.hyena import modal_part, operator, response, short_filter
from jaxinfer.nn.modal import exact_response
from jaxinfer.testing.quick import QUICK

CONFIG = FilterConfig(features=5, width=7, inner_layers=2, frequency=3.0, init="uniform")
FILTERS, LENGTH = 4, 50


def drawn(config: FilterConfig) -> tuple[ImplicitFilter, dict]:
    module = ImplicitFilter(FILTERS, LENGTH, config)
    init = jax.jit(module.init, static_argnums=1, compiler_options=QUICK)
    return module, init(jax.random.key(0), 1)["params"]


def test_features_and_window_are_those_of_the_paper_s_code():
    """laughing_hyena.md 2.2: the ends of the window's rates, and three features by hand."""
    found = features(100, 5)
    t = 30
    expected = [t / 99]
    for part in (np.cos, lambda x: -np.sin(x)):
        expected += [part(f * 2 * np.pi * t / 100) for f in (1e-4, 1.0)]
    np.testing.assert_allclose(found[t], expected, rtol=1e-5)
    np.testing.assert_allclose(features(100, 3)[t][1:], [1, 0], atol=1e-3)
    decay = -np.log(window(FilterConfig(), 64, 2048)[:, -1])
    np.testing.assert_allclose(decay[[0, -1]], [3.070, 15.351], atol=1e-3)
    np.testing.assert_allclose(window(replace(CONFIG, shift=0.5), 3, 9)[:, 0], 1.5)


@pytest.mark.parametrize("change", [{}, {"window": False, "normalized": True}])
def test_a_filter_is_the_network_written_out(change):
    config = replace(CONFIG, **change)
    module, params = drawn(config)
    p = {name: np.asarray(x, np.float64) for name, x in params.items()}
    x = p["positions"] @ p["first"].T + p["first_bias"]
    for weight, bias in zip(p["inner"], p["inner_bias"], strict=True):
        x = np.sin(p["frequency"] * x) @ weight.T + bias
    h = (np.sin(p["frequency"] * x) @ p["last"].T).T
    if config.window:
        h = h * window(config, FILTERS, LENGTH)
    if config.normalized:
        h = h / np.abs(h).sum(axis=0)
    apply = jax.jit(module.apply, static_argnums=1, compiler_options=QUICK)
    for count in (LENGTH, 9):
        found = apply({"params": params}, count)
        np.testing.assert_allclose(found, h[:, :count], atol=1e-5)


def test_each_start_is_as_it_is_named():
    deviation = {}
    for init in ("normal", "uniform", "xavier"):
        _, params = drawn(replace(CONFIG, width=64, init=init))
        assert (np.asarray(params["frequency"]) == 3).all()
        deviation[init] = {name: float(x.std()) for name, x in params.items()}
    assert deviation["normal"]["first_bias"] == 0
    np.testing.assert_allclose(deviation["normal"]["inner"], 0.02, rtol=0.1)
    np.testing.assert_allclose(deviation["uniform"]["inner"], 64**-0.5 / 3**0.5, rtol=0.1)
    np.testing.assert_allclose(deviation["uniform"]["first"], 5**-0.5 / 3**0.5, rtol=0.1)
    np.testing.assert_allclose(deviation["xavier"]["last"], (2 / 68) ** 0.5, rtol=0.2)
    _, fixed = drawn(replace(CONFIG, trained_positions=False))
    assert "positions" not in fixed


def test_real_and_undelayed_filters_are_modes():
    """`real` poles turn by nothing; `undelayed` ones are updated before they are read."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    real = modal_part({"filter": {"nu": draw(3, 2) - 3, "a": draw(3, 2), "h0": draw(3)}})
    assert real is not None and (real.poles().imag == 0).all()
    radius, angle = rng.uniform(0.9, 0.9999, (3, 2)), rng.uniform(-np.pi, np.pi, (3, 2))
    poles = (radius * np.exp(1j * angle)).astype(np.complex64)
    own = {
        "pole_re": jnp.asarray(poles.real), "pole_im": jnp.asarray(poles.imag),
        "residue_re": draw(3, 2), "residue_im": draw(3, 2), "skip": draw(3),
    }  # fmt: skip
    lags = np.arange(300)
    wide = np.asarray(own["residue_re"], complex) + 1j * np.asarray(own["residue_im"])
    h = (wide[..., None] * poles.astype(complex)[..., None] ** lags).real.sum(axis=1)
    h[:, 0] += own["skip"]
    modal = modal_part({"filter": own})
    assert modal is not None
    np.testing.assert_allclose(exact_response(modal, 300), h, atol=1e-4)


def test_higher_orders_gate_from_the_last_projection_to_the_first():
    """laughing_hyena.md 0.3: filter o of channel c is number c (n - 1) + o, o = 0 comes first."""
    cfg, width = HyenaConfig(order=3), 2
    x0, x1, x2, v = (np.random.default_rng(i).standard_normal((1, 3, width)) for i in range(4))
    seen = []

    def convolve(stage, query, inputs):
        seen.append(stage)
        return inputs + 10 * (stage + 1)

    y, inputs = operator(cfg, jnp.concatenate([x0, x1, x2, v], axis=-1), convolve)
    np.testing.assert_allclose(y, x0 * ((x2 * v + 10) * x1 + 20), rtol=1e-5)
    assert seen == [0, 1]
    first, second = x2 * v, (x2 * v + 10) * x1
    expected = np.stack([first, second], axis=-1).reshape(1, 3, -1)
    np.testing.assert_allclose(inputs, expected, rtol=1e-5)
    p = jnp.asarray(np.random.default_rng(5).standard_normal((1, 6, 4)), jnp.float32)
    taps = jnp.asarray([[1.0, 2, 4]] * 4)
    short = short_filter({"taps": taps, "bias": jnp.ones(4)}, p, None, 4)
    np.testing.assert_allclose(short, 1 + 4 * p[:, 2:] + 2 * p[:, 1:5] + p[:, :4], rtol=1e-5)
    explicit = {"filter": {"h": jnp.ones((2, 3))}, "skip": jnp.asarray([1.0, 2])}
    found = response(cfg, explicit, 5, 3)
    np.testing.assert_array_equal(found, [[2, 1, 1, 0, 0], [3, 1, 1, 0, 0]])
