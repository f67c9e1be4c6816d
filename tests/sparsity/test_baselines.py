"""Baselines of sparsity: the dense model at density 1, the density asked for below it, and in the
order of what they know."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.models.params import init_params
from jaxinfer.models.stack import forward
from jaxinfer.sparsity.accounting import measure, shares
from jaxinfer.sparsity.baseline import BASELINES
from jaxinfer.sparsity.baselines import of_prompt, teal
from jaxinfer.sparsity.calibration import Calibration
from jaxinfer.sparsity.observe import layer_weights
from tests.factories import CONFIGS, random_tokens

RELU = replace(CONFIGS["learned"], activation="relu", mlp_bias=True)
FORMS = {"gated": CONFIGS["llama"], "plain": replace(RELU, activation="gelu")}
OF_INPUTS = ("teal", "wina")
CASES = [
    *(("gated", name) for name in BASELINES if name != "contribution-oracle"),
    ("plain", "cats"),
    pytest.param("plain", "teal", marks=pytest.mark.slow),
]
BLOCK = 4  # neurons
TEXT = jnp.asarray(random_tokens(2, 24, seed=9))


@pytest.fixture(autouse=True)
def large_steps(monkeypatch):
    monkeypatch.setattr("jaxinfer.sparsity.baselines.STEP", 0.5)


def params_of(cfg):
    """Random parameters with biases and norms that are not those of a start."""
    params, rng = init_params(cfg, jax.random.key(0)), np.random.default_rng(1)
    return jax.tree.map(
        lambda x: jnp.asarray(x + 0.3 * rng.normal(size=x.shape), jnp.float32), params
    )


@functools.cache
def calibrated(cfg) -> Calibration:
    return Calibration(cfg, params_of(cfg), random_tokens(2, 32))


logits_of = functools.partial(jax.jit, static_argnums=0)(
    lambda cfg, params, tokens: forward(cfg, params, tokens).logits
)


def error_of(calibration, params) -> float:
    wanted, found = (logits_of(calibration.cfg, p, TEXT) for p in (calibration.params, params))
    late = slice(TEXT.shape[1] // 2, None)  # GRIFFIN's first half is dense
    return float(jnp.linalg.norm((found - wanted)[:, late]) / jnp.linalg.norm(wanted[:, late]))


@pytest.mark.parametrize("form, name", CASES)
def test_a_density_of_1_is_the_dense_model_and_less_is_what_was_asked_for(name, form):
    """dejavu.md 6.1; thresholds reach their density on the calibration text within 0.02."""
    calibration = calibrated(FORMS[form])
    cfg, made = calibration.cfg, functools.partial(BASELINES[name], calibration)
    assert error_of(calibration, made(1.0, BLOCK)) < 1e-5
    half, eighth = made(0.5, BLOCK), made(0.125, BLOCK)
    assert 0 < error_of(calibration, half) < error_of(calibration, eighth)
    found = measure(cfg, half, calibration.tokens)
    if name in OF_INPUTS:
        products = {k: w.size for k, w in layer_weights(calibration.params).items() if k[0] == 0}
        used = sum(found.inputs[k] * n for k, n in products.items()) / sum(products.values())
        assert used == pytest.approx(0.5, abs=0.1)
    else:
        assert found.blocks[0] == pytest.approx(0.5, abs=0.02)


def test_relu_is_exact_once_every_active_neuron_is_chosen():
    """dejavu.md 6.3; the oracle chooses no neuron that is zero."""
    calibration = calibrated(RELU)
    active = max(measure(RELU, BASELINES["oracle"](calibration, 1.0, 1), TEXT).blocks)
    assert 0.2 < active < 0.7
    assert error_of(calibration, BASELINES["oracle"](calibration, 0.9, 1)) < 1e-5
    assert error_of(calibration, BASELINES["oracle"](calibration, active / 2, 1)) > 1e-2


def test_the_oracle_beats_what_does_not_look():
    """dejavu.md 6.8: random is worst by a wide margin."""
    calibration = calibrated(CONFIGS["llama"])
    errors = {
        name: error_of(calibration, BASELINES[name](calibration, 0.375, BLOCK))
        for name in ("oracle", "contribution-oracle", "static", "random")
    }
    looking, blind = list(errors.values())[:2], list(errors.values())[2:]
    assert max(looking) < 0.8 * min(blind)


def test_a_greedy_allocation_is_no_worse_than_a_uniform_one():
    calibration = calibrated(CONFIGS["llama"])
    errors = [
        error_of(calibration, teal(calibration, 0.5, allocate=allocate))
        for allocate in ("greedy", "uniform")
    ]
    assert 0 < errors[0] < errors[1]


def test_a_prompts_choice_goes_on_as_it_is_scored():
    """GRIFFIN's scoring of a whole text is its generation from the prompt."""
    calibration = calibrated(CONFIGS["llama"])
    cfg, params, row = calibration.cfg, calibration.params, TEXT[:1]
    half = row.shape[1] // 2
    scored = logits_of(cfg, BASELINES["griffin"](calibration, 0.25, BLOCK), row)
    chosen = of_prompt(cfg, params, np.asarray(row[0, :half]), 0.25, BLOCK)
    blocks = [layer["mlp"].selector.selected for layer in chosen["layers"]]
    assert all(int(block.sum()) == 3 for block in blocks)
    dense = logits_of(cfg, params, row)
    np.testing.assert_allclose(scored[:, :half], dense[:, :half], atol=1e-5)
    # the first layer's keys and values are alike, so that its block is what differs
    one = replace(cfg, num_layers=1)
    cut = lambda tree: tree | {"layers": tree["layers"][:1]}  # noqa: E731
    griffin = cut(BASELINES["griffin"](calibration, 0.25, BLOCK))
    late = logits_of(one, griffin, row)[:, half:]
    np.testing.assert_allclose(late, logits_of(one, cut(chosen), row)[:, half:], atol=1e-4)


BAD = {
    "density": (("cats", 0.0, 1), "density must be above 0 and at most 1"),
    "density above 1": (("teal", 1.5, 1), "density must be a number from 0 to 1, got 1.5"),
    "not a number": (("oracle", float("nan"), 1), "density must be a number"),
    "blocks": (("random", 0.5, 5), "block_size must divide the 48 neurons"),
}


@pytest.mark.parametrize("case", BAD)
def test_impossible_arguments_are_refused(case):
    (name, density, size), message = BAD[case]
    with pytest.raises(ValueError, match=message):
        BASELINES[name](calibrated(CONFIGS["llama"]), density, size)


def test_calibration_refuses_sparse_models_and_what_are_no_tokens():
    cfg, dense = CONFIGS["llama"], calibrated(CONFIGS["llama"])
    sparse = BASELINES["random"](dense, 0.5, BLOCK)
    with pytest.raises(ValueError, match="layer 0 has a SparseMlp already"):
        Calibration(cfg, sparse, random_tokens(1, 8))
    for tokens in (np.zeros((2, 0), int), np.zeros((2, 3)), np.zeros(3, int)):
        with pytest.raises(ValueError, match="rows of token ids"):
            Calibration(cfg, dense.params, tokens)
    with pytest.raises(ValueError, match="from 0 to 60, got 61 to 61"):
        Calibration(cfg, dense.params, np.full((1, 4), 61))
    with pytest.raises(ValueError, match="64 learned positions"):
        Calibration(RELU, params_of(RELU), random_tokens(1, 65))


def test_shares_are_of_the_dense_model():
    calibration = calibrated(CONFIGS["llama"])
    cats = BASELINES["cats"](calibration, 0.5, 1)
    found = measure(calibration.cfg, cats, calibration.tokens)
    got = shares(calibration.params, cats, found)
    mean = float(np.mean(found.blocks))
    assert got.mlp_products == pytest.approx((1 + 2 * mean) / 3)
    assert got.mlp_bytes == pytest.approx(got.mlp_products)  # no biases
    mlp, attn = 3 * 32 * 48, 32 * (32 + 16 + 16 + 32)
    whole = (got.mlp_products * mlp + attn) / (mlp + attn)
    assert got.layer_products == pytest.approx(whole)
