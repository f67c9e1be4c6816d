"""The choice of policies is the best of all that fit, and what fits is counted to the byte."""

import itertools

import numpy as np
import pytest

from jaxinfer.theory.diagnose import allocate


def best(losses, sizes, budget):
    """The least loss of all choices that fit, one by one."""
    layers, candidates = losses.shape
    rows = np.arange(layers)
    choices = [np.array(one) for one in itertools.product(range(candidates), repeat=layers)]
    return min(losses[rows, one].sum() for one in choices if sizes[rows, one].sum() <= budget)


@pytest.mark.parametrize("seed", range(12))
def test_no_choice_that_fits_loses_less(seed):
    rng = np.random.default_rng(seed)
    layers, candidates = 5, 4
    losses = rng.exponential(size=(layers, candidates)) * 10.0 ** rng.integers(-8, 3)
    losses -= 0.01 * losses.max() * (seed % 2)  # measured losses may be below zero
    sizes = rng.integers(1, 10**9, (layers, candidates))
    low, high = sizes.min(axis=1).sum(), sizes.max(axis=1).sum()
    for budget in (low, (low + high) // 2, low + (high - low) // 7, high):
        chosen = allocate(losses, sizes, int(budget))
        rows = np.arange(layers)
        assert sizes[rows, chosen].sum() <= budget
        assert losses[rows, chosen].sum() == pytest.approx(best(losses, sizes, budget), rel=1e-7)


def test_a_greedy_choice_would_lose_more():
    losses = np.array([[10.0, 4.0, 0.0], [10.0, 3.0, 0.0]])
    sizes = np.array([[0, 6, 11], [0, 5, 11]])
    assert allocate(losses, sizes, 11).tolist() == [1, 1]  # 7 of 20; one layer alone gives 10


def test_thirty_layers_of_six_candidates_fill_the_budget_to_the_byte():
    rng = np.random.default_rng(0)
    sizes = np.sort(rng.integers(10**4, 10**7, (30, 6)), axis=1)
    losses = 1.0 / sizes  # more bytes, less loss
    budget = int(sizes[:, 3].sum())
    chosen = allocate(losses, sizes, budget)
    rows = np.arange(30)
    assert sizes[rows, chosen].sum() <= budget
    assert losses[rows, chosen].sum() <= losses[:, 3].sum()


def test_budgets_below_the_smallest_and_losses_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="a budget of 3 bytes is below the 4 of the smallest"):
        allocate(np.ones((2, 2)), np.array([[2, 5], [2, 5]]), 3)
    with pytest.raises(ValueError, match="loss of layer 1 with candidate 0 is not finite"):
        allocate(np.array([[0.0, 1.0], [np.nan, 1.0]]), np.ones((2, 2), int), 9)
