"""Groups of neurons: balanced, the best assignment, the same for the same seed."""

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from jaxinfer.models.quantize import quantize_weights
from jaxinfer.sparsity.grouping import assigned, group_neurons, input_weights
from tests.factories import params_of


def features(neurons: int = 96, width: int = 12, kinds: int = 6, seed: int = 0) -> np.ndarray:
    """Neurons of some kinds, in random order and unequal numbers."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(kinds, width))[rng.integers(0, kinds, neurons)]
    x = x + 0.4 * rng.normal(size=x.shape)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def inertia_of(x: np.ndarray, labels: np.ndarray) -> float:
    return sum(((part - part.mean(0)) ** 2).sum() for j in set(labels) for part in [x[labels == j]])


@pytest.mark.parametrize("size", [1, 8, 16, 96])
def test_every_group_has_its_size_and_inertia_falls(size):
    """lte.md 7.1"""
    x = features()
    found = group_neurons(x, size, seed=3)
    assert (np.bincount(found.labels, minlength=96 // size) == size).all()
    assert (np.diff(found.inertia) < 0).all()
    np.testing.assert_allclose(found.inertia[-1], inertia_of(x, found.labels), atol=1e-9)
    shuffled = np.random.default_rng(0).permutation(np.arange(96) // size)
    assert found.inertia[-1] <= inertia_of(x, shuffled) + 1e-9


def test_groups_follow_from_the_seed():
    """lte.md 7.1"""
    x = features()
    one, same, other = (group_neurons(x, 8, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.labels, same.labels)
    assert (one.labels != other.labels).any()
    assert sorted(one.order) == list(range(96)) and (np.diff(one.labels[one.order]) >= 0).all()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("neurons, size", [(60, 4), (96, 32), (40, 1), (64, 64)])
def test_the_assignment_is_the_best_there_is(neurons, size, seed):
    rng = np.random.default_rng(seed)
    cost = rng.normal(size=(neurons, neurons // size)) + 2 * rng.normal(size=(1, neurons // size))
    labels = assigned(cost, size)
    assert (np.bincount(labels, minlength=neurons // size) == size).all()
    rows, columns = linear_sum_assignment(np.repeat(cost, size, axis=1))
    np.testing.assert_allclose(cost[rows, labels].sum(), cost[rows, columns // size].sum())


def test_ties_and_equal_neurons_end_too():
    assert np.bincount(assigned(np.zeros((12, 3)), 4)).tolist() == [4, 4, 4]
    assert np.bincount(group_neurons(np.zeros((12, 5)), 4).labels).tolist() == [4, 4, 4]


def test_gated_blocks_are_grouped_by_their_gates():
    gated = params_of("llama")["layers"][0]["mlp"]
    plain = params_of("learned")["layers"][0]["mlp"]
    for block, name in ((gated, "gate"), (plain, "up")):
        found, weight = input_weights(block), np.asarray(block[name]["weight"], np.float64)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1)
        np.testing.assert_allclose((found * weight).sum(1), np.linalg.norm(weight, axis=1))


def test_impossible_groups_are_refused():
    with pytest.raises(ValueError, match="96 neurons cannot be cut into blocks of 10"):
        group_neurons(features(), 10)
    with pytest.raises(ValueError, match="not finite"):
        group_neurons(np.full((8, 2), np.nan), 4)
    stored = quantize_weights({"layers": params_of("llama")["layers"], "head": {}}, "int8")
    with pytest.raises(ValueError, match="load the model without `weights`"):
        input_weights(stored["layers"][0]["mlp"])
