"""No plan serves more than the integer programme's bound, and some reach it."""

import dataclasses

import numpy as np
import pytest

from jaxinfer.parallel.hexgen.bound import capacity_bound
from jaxinfer.parallel.hexgen.layouts import best_layout
from jaxinfer.parallel.hexgen.starts import set_partitions
from tests.parallel.hexgen.brute_force import random_table


def test_the_bound_holds_for_every_division_of_a_small_cluster():
    random, near = np.random.default_rng(0), 0
    for _ in range(2):
        table = random_table(random, 2, 6, back=False)
        bound, best = capacity_bound(table, (3, 2), 6), 0.0
        for parts in set_partitions((3, 2), complete=False):
            found = [best_layout(table, counts, 6, "bottleneck") for counts in parts]
            best = max(best, sum(1 / one.bottleneck_s for one in found if one is not None))
        assert best <= bound * (1 + 1e-9)
        near += best > 0.5 * bound
    assert near > 0


def test_layers_that_divide_over_equal_accelerators_reach_the_bound():
    table = random_table(np.random.default_rng(1), 1, 8, back=False)
    free = np.zeros_like(table.stage_s)
    table = dataclasses.replace(
        table, stage_s=free, last_s=free, hop_s=np.zeros((1, 1)), degrees=(1, 2, 4),
        layer_s=np.array([[1.0, 0.6, 0.4]]), caps=np.full_like(table.caps, 8),
    )  # fmt: skip
    found = best_layout(table, (4,), 8, "bottleneck")
    assert found is not None and found.bottleneck_s == pytest.approx(2.0)
    assert capacity_bound(table, (4,), 8) == pytest.approx(1 / found.bottleneck_s)
