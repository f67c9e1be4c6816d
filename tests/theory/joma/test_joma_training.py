"""What training one layer conserves, and where that ends: joma.md 10.1, 10.2 and 10.6."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.theory.joma import (
    Layer,
    check,
    multinomial_contexts,
    overlapping_contexts,
    train_layer,
)

CASES = list(itertools.product(("identity", "relu"), (1, 3), (False, True)))
SIZES = {0.2: 200, 0.05: 800, 0.0125: 3200}  # learning rate: steps


def contexts(asking: int = 1, seed: int = 0):
    """64 examples in which `asking` of three queries ask: one program for all of these tests."""
    found = multinomial_contexts(examples=64, queries=asking, seed=seed)
    return dataclasses.replace(found, queries=3)


@pytest.mark.parametrize("attention", ["linear", "exp", "softmax"])
def test_10_1_the_error_of_an_exact_invariant_is_that_of_the_step_size(attention):
    for activation, asking, train_top in CASES:
        errors = []
        for rate, steps in SIZES.items():
            run = train_layer(
                contexts(asking), attention, activation, steps=steps, learning_rate=rate,
                train_top=train_top,
            )  # fmt: skip
            found = check(run)
            errors.append(found.exact.relative_error)
            if attention == "softmax":
                assert found.logit_sum < 1e-12
        assert errors[1] < (6e-3 if attention == "softmax" else 1e-2)
        for larger, smaller in itertools.pairwise(errors):  # 16 : 4 : 1
            assert larger / smaller == pytest.approx(4, rel=0.25)


def test_the_sum_over_queries_is_conserved_and_no_single_query():
    run = train_layer(contexts(3), "exp", steps=2000)
    layers, found = run.records.layer, check(run)
    assert found.exact.relative_error < 1e-2
    moved = layers.z[-1] - layers.z[0]
    single = np.linalg.norm(moved - found.exact.right, axis=1) / np.linalg.norm(moved, axis=1)
    assert (single > 0.5).all()


def test_a_ratio_of_learning_rates_multiplies_one_side():
    run = train_layer(contexts(), "exp", steps=2000, ratio=0.5)
    assert check(run).exact.relative_error < 1e-2
    assert check(dataclasses.replace(run, ratio=1.0)).exact.relative_error > 0.5


def test_the_identity_of_softmax_needs_its_accumulated_term():
    run = train_layer(contexts(), steps=2000)
    found = check(run)
    assert found.paper is not None and found.exact.relative_error < 6e-3
    assert found.paper.relative_error > 0.3


@pytest.mark.parametrize(
    ("kind", "least", "middle"), [("gaussian", 0.97, 0.97), ("random", 0.85, 0.93)]
)
def test_10_2_the_softmax_formula_correlates_and_has_another_scale(kind, least, middle):
    correlations, errors = [], []
    for seed in range(5):
        rng = np.random.default_rng([seed, 1])
        shapes = Layer((20, 20), (1, 20), (1, 20), (20, 20))
        start = Layer(*(rng.normal(size=shape) / 100 for shape in shapes))
        run = train_layer(
            overlapping_contexts(kind, seed), steps=2000, learning_rate=0.1, temperature=0.5,
            start=start._replace(out=np.eye(20)),
        )  # fmt: skip
        found = check(run)
        assert found.paper is not None and found.first_term is not None
        correlations.append(found.paper.correlation)
        errors.append(found.paper.relative_error)
        assert abs(found.first_term.correlation - found.paper.correlation) < 0.03
        assert found.exact.relative_error < 1e-2  # with the accumulated term it does hold
    assert min(correlations) >= least and np.median(correlations) >= middle
    assert min(errors) > 1.5 and max(errors) < 9


@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_10_6_a_frozen_gradient_makes_attention_sparse_and_cross_entropy_lets_it_rebound(
    activation,
):
    for seed in (0, 1):
        frozen = train_layer(
            contexts(1, seed), "softmax", activation, steps=2000, learning_rate=0.5,
            frozen_gradient=True,
        )  # fmt: skip
        assert (np.diff(frozen.records.entropy) < 0).all()
        assert frozen.records.stable_rank[-1] < 1.2 < frozen.records.stable_rank[0]
        moving = train_layer(
            contexts(1, seed), "softmax", activation, steps=2000, learning_rate=0.5,
            train_top=True, seed=seed,
        ).records.entropy  # fmt: skip
        lowest = moving.argmin()
        # Drop and rebound, also with the identity: no proof of nonlinearity.
        assert 0 < lowest < 8 and moving[0] - moving[lowest] > 0.1
        assert moving[-1] - moving[lowest] > 0.01


def test_saliency_is_constant_where_the_theory_says_so():
    run = train_layer(contexts(), "exp", steps=100, frozen_gradient=True)
    saliency = run.records.saliency
    np.testing.assert_allclose(saliency[-1], saliency[0], rtol=1e-12)
    moving = train_layer(contexts(), "exp", steps=400).records.saliency
    assert np.abs(moving[-1] - moving[0]).max() > 0.01 * np.abs(moving[0]).max()


def test_training_is_float64_and_leaves_no_trace():
    run = train_layer(contexts(), "exp", steps=400)
    assert run.records.layer.v.dtype == np.float64 and run.step.tolist() == list(range(0, 401, 20))
    again = train_layer(contexts(), "exp", steps=400)
    np.testing.assert_array_equal(run.records.loss, again.records.loss)
    assert not jax.config.jax_enable_x64 and jnp.ones(1).dtype == jnp.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "dot"}, "attention must be one of"),
        ({"activation": "gelu"}, "activation must be one of 'identity', 'relu'"),
        ({"steps": 30}, "steps must be a multiple of records, got 30 and 20"),
        ({"frozen_gradient": True, "train_top": True}, "leave out train_top"),
        ({"attention": "linear", "learning_rate": 1e5, "steps": 400}, "loss is not finite"),
        ({"start": (1, 2)}, "start must be a Layer"),
    ],
)
def test_bad_settings_are_one_line(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        train_layer(contexts(), **options)
    assert "\n" not in str(caught.value)


def test_bad_contexts_and_records_are_one_line():
    good = contexts()
    for change, message in [
        ({"x": -good.x}, "not negative"),
        ({"x": good.x * np.nan}, "finite"),
        ({"query": good.query + 5}, "query must be below 3, got 5"),
        ({"label": good.label[:4]}, "label must be whole numbers, one for each of 64"),
    ]:
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(good, **change)
    with pytest.raises(ValueError, match="record must be from 1 to 20, got 0"):
        check(train_layer(good, "exp", steps=400), record=0)
