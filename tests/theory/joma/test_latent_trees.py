"""Latent trees, the grammar, and what a decoder learns of them: joma.md 10.7 and 10.8."""

import jax
import numpy as np
import pytest

from jaxinfer.theory.joma import grammar, latent_tree, learn_hierarchy
from jaxinfer.theory.joma.hierarchy import best_correlation

DRAWS = 50_000


def formula(rho: float, levels: int, rho_0: float, height: int) -> float:
    whole = rho ** (levels - 1) * rho_0
    return 0.5 * (1 + rho ** (2 * height) - 2 * whole) / (1 - whole)


@pytest.mark.parametrize(
    ("rho", "levels", "rho_0", "expected"),
    [
        (0.9, 4, 0.58, [0.835407, 0.702086, 0.594096]),
        (0.7, 4, 0.5, [0.692215, 0.541400, 0.467501]),
        (0.8, 3, 0.0, [0.82, 0.7048]),
    ],
)
def test_co_occurrence_is_the_formula(rho, levels, rho_0, expected):
    tree = latent_tree(levels, width=1, rho=rho, first=[[(1 - rho_0) / 2]])
    found = [tree.co_occurrence(0, 2**height - 1) for height in range(1, levels)]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    heights = range(1, levels)
    np.testing.assert_allclose(found, [formula(rho, levels, rho_0, h) for h in heights], rtol=1e-12)
    assert tree.co_occurrence(1, 1) == 1


@pytest.mark.parametrize("rho", [0.9, 0.7, (0.95, 0.8, 0.6)])
def test_10_7_simulated_co_occurrence_is_within_four_standard_errors(rho):
    tree = latent_tree(4, rho=rho, seed=3)
    leaves = np.asarray(tree.sample(jax.random.key(0), DRAWS).nodes[0])
    given = leaves[leaves[:, 0]]
    for other, height in ((1, 1), (2, 2), (5, 3), (8, 4)):  # the last beyond the root
        assert tree.ancestor_height(0, other) == height
        expected = tree.co_occurrence(other, 0)
        error = np.sqrt(expected * (1 - expected) / len(given))
        assert abs(given[:, other].mean() - expected) < 4 * error


def test_sequences_hold_the_tokens_that_are_there_behind_padding():
    tree = latent_tree(3, classes=3)
    found = tree.sample(jax.random.key(1), 50)
    for shuffled in (False, True):
        order = jax.jit(tree.sequences, static_argnums=2)
        rows = np.asarray(order(jax.random.key(2), found, shuffled))
        assert rows.shape == (50, tree.tokens)
        for row, present in zip(rows, np.asarray(found.nodes[0]), strict=True):
            padding = int((row == tree.tokens).sum())
            assert (row[:padding] == tree.tokens).all() and padding == (~present).sum()
            assert sorted(row[padding:]) == np.flatnonzero(present).tolist()
            if not shuffled:
                assert (np.diff(row[padding:]) > 0).all()
    assert [level.shape[1] for level in found.nodes] == [8, 4, 2]


def test_a_grammar_is_the_closure_of_its_classes():
    made = grammar(100, 60, (10, 20, 20), (2, 2, 2))
    assert made.inputs.shape == (20, 60) and [x.shape[1] for x in made.latents] == [10, 20, 20]
    assert (made.latents[1].sum(axis=1) == 2).all() and (made.latents[2] == np.eye(20)).all()
    # classes are different sets of level 2, and a token is there because of a level-1 symbol
    assert len(np.unique(made.latents[1], axis=0)) == 20
    present = np.stack([np.isin(np.arange(99), row) for row in made.inputs])
    for token in np.flatnonzero(present.any(axis=0)):
        owners = [x for x in made.latents[0].T if (present[:, token] | ~x).all()]
        assert owners
    for row in made.inputs:
        inside = row[row != 99]
        assert (np.diff(inside) > 0).all() and (row[: 60 - len(inside)] == 99).all()


@pytest.mark.slow  # compiles a training
def test_the_experiment_stands_beside_both_baselines():
    tree = latent_tree(2, branches=4, classes=3, seed=1)
    found = learn_hierarchy(
        tree, width=8, steps=60, batch=32, held_out=256, learning_rate=1e-2, seed=2
    )
    for one in (found.untrained, found.frozen_attention, found.trained):
        assert one.correlation.shape == (1,) and (np.abs(one.correlation) <= 1).all()
    assert found.trained.loss < found.untrained.loss
    assert found.frozen_attention.loss < found.untrained.loss
    assert found.frozen_attention.loss != found.trained.loss
    np.testing.assert_array_equal(
        found.gain, found.trained.correlation - found.untrained.correlation
    )


@pytest.mark.slow
def test_10_8_upper_layers_gain_from_training_on_the_three_layer_grammar():
    """Frozen attention gains as much here, which is why it is reported too."""
    found = learn_hierarchy(
        grammar(100, 60, (10, 20, 20), (2, 2, 2)), width=128, steps=2000, learning_rate=1e-4
    )
    print(found)
    assert (found.gain[1:] >= 0.05).all()
    assert found.untrained.correlation[0] > 0.9  # a baseline near the top


def test_the_best_correlation_of_each_latent():
    latents = np.array([[0, 1, 1], [1, 0, 1], [1, 1, 1]], bool)
    hidden = np.array([[3.0, 0, 0], [3.0, 7, 0], [3.0, 7, 1]])
    np.testing.assert_allclose(best_correlation(latents, hidden), [1.0, 0.5])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: latent_tree(1), "levels must be a whole number from 2"),
        (lambda: latent_tree(40), r"2 x 2\^39 tokens is too large"),
        (lambda: latent_tree(4, rho=1.5), r"rho must be in \[-1, 1\]"),
        (lambda: latent_tree(4, rho=[0.5, 0.5]), "one number or 3 of them"),
        (lambda: latent_tree(3, first=[[1.5, 0.2]]), "first must be probabilities"),
        (lambda: latent_tree(3).co_occurrence(0, 8), "other must be a whole number from 0 to 7"),
        (lambda: grammar(4, 20, (20,), (3,)), "no 20 different sets of 3 out of 3"),
        (lambda: grammar(100, 3, (10, 20), (2, 2)), "do not fit; raise length=3"),
        (lambda: learn_hierarchy("tree"), "source must be a latent_tree"),
    ],
)
def test_bad_input_is_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
