"""Recall, capacities and unions of scores."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.sparsity.base import Rule
from jaxinfer.sparsity.recall import (
    BATCHES,
    PARTS,
    allotted,
    batched,
    by_density,
    by_recall,
    capacities,
    in_parts,
    recall_curve,
    unions,
)

RNG = np.random.default_rng(0)
R, J = 512, 48


def example(noise: float = 1.0, density: float = 0.2):
    """Scores that say more or less what is needed; rows differ in how much they need."""
    truth = RNG.normal(size=(R, J)) + RNG.normal(size=J)
    needed = truth > np.quantile(truth, 1 - density)
    return truth + noise * RNG.normal(size=(R, J)), needed


def test_recall_is_the_share_of_the_needed_that_the_rule_selects():
    scores, needed = example()
    scores[:, 3:9] = scores[:, 3:4]  # ties
    curve = recall_curve(scores, needed)
    some = needed.any(axis=1)
    for most in (1, 7, 30, J):
        selected = np.asarray(Rule(most=most)(jnp.asarray(scores, jnp.float32)))
        wanted = ((selected & needed).sum(axis=1)[some] / needed.sum(axis=1)[some]).mean()
        np.testing.assert_allclose(curve[most - 1], wanted, atol=1e-12)


def test_random_scores_find_their_share():
    """dejavu.md 6.7: random selection gives recall = density."""
    _, needed = example()
    curve = recall_curve(RNG.normal(size=(R, J)), needed)
    np.testing.assert_allclose(curve, np.arange(1, J + 1) / J, atol=0.03)


def test_a_unit_is_in_a_batch_as_if_rows_were_independent():
    scores = RNG.normal(size=(64, J))
    p = 1 / (1 + np.exp(-scores.reshape(16, 4, J)))
    np.testing.assert_allclose(batched(scores, 4), -np.log(np.prod(1 - p, axis=1)))
    assert (np.argsort(batched(scores, 1)) == np.argsort(scores)).all()


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("target", [0.6, 0.99])
def test_capacities_reach_their_recall_for_every_batch(target, multiple):
    """dejavu.md 6.9: the union's recall is reached, capacities grow with the batch and are
    multiples of the block."""
    scores, needed = example()
    found = capacities(scores, needed, target, multiple=multiple)
    assert [one.rows for one in found] == list(BATCHES)
    counts = [one.units for one in found]
    assert counts == sorted(counts) and all(count % multiple == 0 for count in counts)
    for one in found:
        assert one.recall >= target - 1e-9
        truth = needed.reshape(-1, one.rows, J).any(axis=1)
        curve = recall_curve(batched(scores, one.rows), truth)
        assert one.recall == curve[one.units - 1]
        if one is found[0]:  # and no smaller one would do
            assert curve[one.units - multiple - 1] < target


def test_a_cap_ends_the_search_and_the_recall_reached_is_told():
    scores, needed = example(noise=3.0)
    found = capacities(scores, needed, 0.99, most=20)
    assert {one.units for one in found} == {20}
    assert all(0.3 < one.recall < 0.99 for one in found)


def test_unions_grow_from_the_density_of_a_row_and_less_than_if_rows_were_independent():
    scores, _ = example()
    selected = np.asarray(Rule(most=12)(jnp.asarray(scores, jnp.float32)))
    found = unions(selected)
    assert found[0] == 12 / J and len(found) == len(BATCHES)
    assert all(a < b for a, b in zip(found, found[1:], strict=False))
    assert all(u < 1 - (1 - 12 / J) ** b for u, b in zip(found[1:5], BATCHES[1:5], strict=True))


@pytest.mark.parametrize("density", [1 / 16, 0.125, 0.5, 1.0])
def test_a_budget_is_allotted_so_that_layers_find_the_same_share(density):
    curves = []
    for natural in (0.05, 0.2, 0.4):
        scores, needed = example(noise=0.3, density=natural)
        curves.append(in_parts(recall_curve(scores, needed)))
    found = allotted(curves, density)
    assert np.mean(found) == pytest.approx(density, abs=1 / PARTS)
    assert found == sorted(found) and (len(set(found)) > 1) == (density < 1)
    recalls = [
        (0.0, *curve)[round(share * PARTS)] for curve, share in zip(curves, found, strict=True)
    ]
    steps = [np.diff((0.0, *curve)).max() for curve in curves]
    assert max(recalls) - min(recalls) <= max(steps)
    even = [(0.0, *curve)[round(density * PARTS)] for curve in curves]
    assert min(recalls) >= min(even)


def test_a_layer_that_needs_nothing_more_gets_nothing_more():
    level, steep = (1.0,) * PARTS, tuple(np.arange(1, PARTS + 1) / PARTS)
    assert allotted([level, steep], 0.25) == [1 / PARTS, 0.5 - 1 / PARTS]
    assert allotted([level, level], 0.25) == [0.25, 0.25]


def test_capacities_by_density_and_by_recall():
    assert [by_density(J, share, 16) for share in (0.01, 0.34, 0.5, 1.0)] == [16, 16, 32, 48]
    assert by_density(J, 0.001) == 1
    curve = np.linspace(1 / J, 1, J)
    assert [by_recall(curve, target) for target in (0.0, 0.5, 1.0)] == [1, 24, 48]
    assert by_recall(curve, 0.5, multiple=16) == 32 and by_recall(curve, 0.5, most=20) == 20
    for share in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"density must lie in \(0, 1\]"):
            by_density(J, share)
    with pytest.raises(ValueError, match="63 tokens are too few, at least 64"):
        unions(np.ones((63, J), bool))
