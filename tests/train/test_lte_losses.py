"""LTE's losses and gates: values, gradients, and what a step does to the parameters."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxinfer.sparsity.router import SigmoidRouter, as_router
from jaxinfer.train.language_model import next_token_loss
from jaxinfer.train.loop import Loss
from jaxinfer.train.lte.losses import efficiency, separation, statistics
from jaxinfer.train.lte.objective import PROPORTIONAL, learning, serving, steered
from jaxinfer.train.lte.recipe import PRESETS, LteRecipe, preset
from jaxinfer.train.lte.student import Student
from jaxinfer.train.lte.training import STEERING_RATE, transform
from tests.train.lte_toys import SIZE, TEXT, TOYS, recipe, toy

Stage = Callable[[Student], Loss]


@functools.cache
def student_of(**changes) -> Student:
    lm = toy()
    orders = tuple(np.random.default_rng(i).permutation(64).astype(np.int32) for i in range(2))
    return Student.of(lm.config, lm.params, recipe(**changes), orders)


PLAIN = {"eta": 0.0}
"""The recipe of the tests that share compiled programs."""


@functools.cache
def graded(stage: Stage):
    """(loss, metrics), gradient of a stage, compiled once."""
    return jax.jit(jax.value_and_grad(stage(student_of(**PLAIN)), has_aux=True))


def found_by(stage: Stage, trained, tokens=TEXT[:4], mask=None):
    mask = np.ones(tokens.shape, bool) if mask is None else mask
    batch = {
        "tokens": jnp.asarray(tokens), "fixed": {}, "separation": jnp.float32(0.0), "mask": mask
    }  # fmt: skip
    return graded(stage)(trained, batch, jax.random.key(0))


def trained_with(bias: float = 0.0):
    """Routers of random weights; the bias opens or closes all blocks."""
    student, keys = student_of(**PLAIN), jax.random.split(jax.random.key(7), 2)
    routers = tuple(
        {"outer": jax.random.normal(key, (64 // SIZE, 32)), "bias": jnp.full(64 // SIZE, bias)}
        for key in keys
    )
    return student.parts() | {"routers": routers}


def test_the_losses_of_constant_scores():
    """lte.md 7.4"""
    for c in (0.0, 0.3, 1.0):
        assert float(efficiency(jnp.full((7, 5), c))) == pytest.approx(c**2)
    ends = jnp.asarray(np.random.default_rng(0).integers(0, 2, (7, 5)), jnp.float32)
    assert float(separation(ends)) == 4.0
    assert float(separation(jnp.full((7, 5), 0.5), epsilon=1e-2)) == pytest.approx(100)


def test_padding_counts_in_no_mean():
    logits = jax.random.normal(jax.random.key(0), (10, 6))
    valid = jnp.arange(10) < 4
    found = statistics(logits, logits > 0, valid, 1e-2)
    wanted = statistics(logits[:4], logits[:4] > 0, None, 1e-2)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    mask = np.tile(np.arange(TEXT.shape[1]) < 19, (4, 1))
    padded = np.where(mask, TEXT[:4], 0)
    trained = trained_with()
    one, other, whole = (
        found_by(learning, trained, tokens, mask)[0]
        for tokens, mask in ((padded, mask), (TEXT[:4], mask), (TEXT[:4], None))
    )
    for name in ("task", "efficiency", "density"):
        assert float(one[1][name]) == float(other[1][name]) != float(whole[1][name])


def test_gradients_are_those_of_the_formulas_and_of_finite_differences():
    """lte.md 7.3, in float64: see `lte_float64.py`."""
    root = Path(__file__).resolve().parents[2]
    found = subprocess.run(
        [sys.executable, "-m", "tests.train.lte_float64"], cwd=root, capture_output=True, text=True,
        env=os.environ | {"JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr


def test_open_gates_train_as_the_dense_model_does():
    """lte.md 7.4: one step of plain descent at rate 1, with eta = lambda = 0."""
    (loss, _), found = found_by(learning, trained_with(bias=jnp.inf))
    dense = student_of(**PLAIN).base
    step = jax.jit(jax.value_and_grad(next_token_loss(TOYS["gated"]), has_aux=True))
    (wanted_loss, _), wanted = step(dense, jnp.asarray(TEXT[:4]), jax.random.key(0))
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-6)
    assert float(optax.tree.norm(wanted)) > 0.1
    for a, b in _pairs(found["model"], wanted):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert float(optax.tree.norm(found["routers"])) == 0


def _pairs(one, other):
    return zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)


def test_straight_through_gates_serve_as_they_are_trained_and_teach_the_routers():
    """lte.md 7.4 and, of stage 2, 7.3"""
    trained = trained_with()
    (loss, found), grads = found_by(learning, trained)
    (served, _), later = found_by(serving, trained)
    assert float(loss) == float(served)
    assert 0.2 < float(found["density"]) < 0.8
    assert min(float(optax.tree.norm(layer)) for layer in grads["routers"]) > 1e-6
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(later["routers"]))
    assert float(optax.tree.norm(later["model"])) > 0.1


@pytest.mark.parametrize("target", [0.05, 1.0])
def test_steering_moves_eta_towards_the_target(target):
    made = recipe(target_density=target)
    (density, log_eta), eps = (jnp.float32(0.4), jnp.float32(-2.0)), 1e-6

    def of(log_eta):
        eta, steering = steered(made, {"log_eta": log_eta}, density)
        return steering, (eta, steering)

    gradient, (eta, steering) = jax.grad(of, has_aux=True)(log_eta)
    error = np.log(0.4 / target)
    assert float(steering) == 0
    assert abs(float(gradient) + error) < eps  # descent raises log eta by the error
    assert float(eta) == pytest.approx(np.exp(-2 + PROPORTIONAL * error), rel=1e-5)


def test_routers_are_clipped_apart_from_the_model_and_have_their_own_rate():
    trained = {"model": jnp.ones((3, 2)), "routers": (jnp.ones((2, 2)),), "log_eta": jnp.zeros(())}
    adam = transform(recipe(router_rate=0.5), 100)
    update, moved = jax.jit(adam.update), {}
    for loud in (1.0, 1e6):
        grads = trained | {"routers": (loud * trained["routers"][0],), "log_eta": jnp.ones(())}
        state = adam.init(trained)
        for _ in range(3):  # the rate of the first update is 0
            moved[loud], state = update(grads, state, trained)
    for a, b in _pairs(moved[1.0], moved[1e6]):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    one = moved[1.0]
    np.testing.assert_allclose(one["routers"][0], 0.5 * one["model"][:2], rtol=1e-5)
    assert float(one["log_eta"]) == pytest.approx(-STEERING_RATE)


def test_the_routers_start_at_the_centres_of_their_blocks():
    student = student_of(start="centres")
    found = student.routers()["routers"][0]["outer"]
    gate = np.asarray(student.base["layers"][0]["mlp"]["gate"]["weight"], np.float64)
    unit = gate / np.linalg.norm(gate, axis=1, keepdims=True)
    centres = unit.reshape(-1, SIZE, unit.shape[1]).mean(axis=1)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    np.testing.assert_allclose(found, centres, atol=1e-6)
    assert as_router({"outer": found}).units == SigmoidRouter(4).units


def test_presets_say_what_they_are():
    assert preset("paper") == LteRecipe(method="soft", start="normal", eta=1.0, separation=0.5)
    assert preset("ste", eta=None) == LteRecipe() and preset("ste", eta=0.3).eta == 0.3
    assert {preset(name, target_density=0.5).method for name in PRESETS} == {
        "soft", "straight_through", "random", "dense"
    }  # fmt: skip


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("lte", {}, "preset must be one of"),
        ("random", {}, "give target_density"),
        ("ste", {"target_density": 0.0}, "target_density must be a number from 0.001 to 1, got 0"),
        ("ste", {"eta": float("nan")}, "eta must be a number"),
        ("ste", {"steps": 1}, "steps must be a whole number from 2"),
        ("paper", {"epsilon": 0.0}, "epsilon must be a number from"),
    ],
)
def test_impossible_recipes_are_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        preset(name, **changes)
