"""The dynamic programme against the vectors of hexgen.md 5.2 and against all pipelines."""

import dataclasses

import networkx
import numpy as np
import pytest

from jaxinfer.parallel.hexgen.costs import Assumptions, Costs
from jaxinfer.parallel.hexgen.inventory import Link
from jaxinfer.parallel.hexgen.layouts import (
    Layout,
    Stage,
    best_layout,
    frontier,
    symmetric_layout,
)
from jaxinfer.parallel.hexgen.sizes import ModelSizes
from tests.parallel.hexgen.brute_force import pipelines, random_table
from tests.parallel.hexgen.clusters import GPUS, cluster

VECTORS = {  # id: machines, layers, latency, its plan, bottleneck, its plan
    "V1": (
        (("A5000", 1, "X"), ("A4000", 1, "X")), 24,
        2.088922605, [(0, 1, 15), (1, 1, 9)], 1.053536919, [(0, 1, 15), (1, 1, 9)],
    ),
    "V2": (
        (("A5000", 2, "X"), ("A4000", 2, "X")), 36,
        1.395482928, [(0, 2, 31), (1, 2, 5)], 0.808980315, [(1, 2, 13), (0, 2, 23)],
    ),
    "V3": (
        (("A6000", 1, "X"), ("A5000", 2, "X"), ("3090Ti", 1, "Y")), 40,
        1.711180707, [(0, 1, 9), (1, 2, 31)],
        0.816838606, [(1, 2, 23), (0, 1, 2), (2, 1, 15)],
    ),
    "V4": (
        (("A4000", 4, "X"),), 38,
        1.202248956, [(0, 4, 38)], 1.129883556, [(0, 2, 19), (0, 2, 19)],
    ),
}  # fmt: skip


def costs_of(machines, hidden=8192, layers=80, **links) -> Costs:
    sizes = ModelSizes.published(hidden, layers)
    return Costs(cluster(*machines, **links), sizes, Assumptions.published())


@pytest.mark.parametrize("name", VECTORS)
def test_vectors_of_hexgen_md_5_2(name):
    machines, layers, latency, fast, bottleneck, steady = VECTORS[name]
    costs = costs_of(machines)
    table = costs.table(64, 32, 96)
    found = best_layout(table, costs.cluster.counts, layers)
    assert found is not None and found.latency_s == pytest.approx(latency, abs=1e-9)
    assert sorted(found.stages) == sorted(Stage(*stage) for stage in fast)  # or its mirror
    found = best_layout(table, costs.cluster.counts, layers, "bottleneck")
    assert found is not None and found.bottleneck_s == pytest.approx(bottleneck, abs=1e-9)
    assert list(found.stages) == [Stage(*stage) for stage in steady]


def test_layer_times_caps_and_hops_of_hexgen_md_5_2():
    machines = [(gpu, 8, "X" if gpu != "3090Ti" else "Y") for gpu in GPUS]
    costs = costs_of(machines)
    table, place = costs.table(64, 32, 96), list(GPUS).index
    stated = {
        "A5000": (68.501826, 35.173057), "A4000": (117.059658, 59.451973, 31.638130),
        "A6000": (68.106405,), "3090Ti": (53.063298,),
    }  # fmt: skip
    for gpu, times in stated.items():
        assert table.layer_s[place(gpu)][: len(times)] * 1e3 == pytest.approx(times, abs=1e-6)
    caps = {"A5000": [15, 31], "A4000": [10, 21, 42], "A6000": [31], "3090Ti": [15]}
    for gpu, most in caps.items():
        assert (table.caps[place(gpu), : len(most)] == np.array(most)[:, None, None]).all()
    a5000, a4000, ti = place("A5000"), place("A4000"), place("3090Ti")
    hops = table.hop_s[a5000, [a5000, a4000, ti]] * 1e3
    assert hops == pytest.approx([0.296072, 7.858291, 672.582912], abs=1e-6)


@pytest.mark.parametrize("trials", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_the_programme_equals_all_pipelines_of_random_groups(trials):
    """hexgen.md 5.2, property; the groups that hold no model are among them."""
    random, infeasible = np.random.default_rng(0), 0
    for trial in range(trials):
        machines = int(random.integers(1, 4))
        counts = tuple(int(n) for n in random.multinomial(4 - trial % 2, [1 / machines] * machines))
        layers = int(random.integers(1, 9))
        table = random_table(random, machines, layers, back=bool(trial % 3))
        use_all = trial % 5 == 0
        every = list(pipelines(table, counts, layers, use_all))
        fast = best_layout(table, counts, layers, use_all=use_all)
        steady = best_layout(table, counts, layers, "bottleneck", use_all=use_all)
        if not every:
            assert fast is None and steady is None
            infeasible += 1
            continue
        assert fast is not None and steady is not None
        assert table.is_within(fast.stages) and table.is_within(steady.stages)
        assert fast == table.layout(fast.stages)
        assert fast.latency_s == pytest.approx(min(one for one, _ in every), rel=1e-12)
        assert steady.bottleneck_s == pytest.approx(min(two for _, two in every), rel=1e-12)
    assert 0.04 < infeasible / trials < 0.5


def test_the_frontier_has_every_pair_that_no_pipeline_beats():
    random, points = np.random.default_rng(1), 0
    for trial in range(12):
        table = random_table(random, 2, 7, back=bool(trial % 2))
        every = sorted(pipelines(table, (2, 2), 7))
        best, undominated = np.inf, []
        for latency, bottleneck in every:
            if bottleneck < best * (1 - 1e-9):
                if undominated and latency <= undominated[-1][0] * (1 + 1e-9):
                    undominated.pop()
                undominated.append((latency, bottleneck))
                best = bottleneck
        found = [(one.latency_s, one.bottleneck_s) for one in frontier(table, (2, 2), 7)]
        assert np.array(found).reshape(-1, 2) == pytest.approx(
            np.array(undominated).reshape(-1, 2), rel=1e-9
        )
        points += len(found)
    assert points > 24


def test_the_latency_is_a_shortest_path():
    """Another algorithm that is not ours: Dijkstra's, over the states of the programme."""
    random = np.random.default_rng(2)
    table = random_table(random, 3, 12, back=False)
    table = dataclasses.replace(table, caps=np.maximum(table.caps, 4))
    counts, layers, graph = (4, 3, 2), 12, networkx.DiGraph()
    frontier_states, seen = [(0, counts, None)], set()
    while frontier_states:
        state = frontier_states.pop()
        if state in seen:
            continue
        seen.add(state)
        done, free, before = state
        for m in range(3):
            for t, n in enumerate(table.degrees):
                rest = tuple(c - n * (i == m) for i, c in enumerate(free))
                if rest[m] < 0:
                    continue
                hop = 0.0 if before is None else table.hop_s[before, m]
                for x in range(1, layers - done + 1):
                    last = done + x == layers
                    if x > table.caps[m, t, int(before is None), int(last)]:
                        continue
                    time = hop + table.stage_s[m, t] + x * table.layer_s[m, t]
                    following = "end" if last else (done + x, rest, m)
                    time += table.last_s[m, t] * last
                    if time < graph.get_edge_data(state, following, {}).get("weight", np.inf):
                        graph.add_edge(state, following, weight=time)
                    if not last:
                        frontier_states.append(following)
    shortest = networkx.dijkstra_path_length(graph, (0, counts, None), "end")
    found = best_layout(table, counts, layers)
    assert found is not None and found.latency_s == pytest.approx(shortest, rel=1e-12)


def test_another_accelerator_never_raises_the_optimum():
    """hexgen.md 5.2, monotone."""
    random = np.random.default_rng(3)
    for _ in range(12):
        table = random_table(random, 2, 6, back=False)
        counts = (int(random.integers(0, 3)), int(random.integers(0, 3)))
        for objective in ("latency", "bottleneck"):
            before = best_layout(table, counts, 6, objective)
            for more in ((1, 0), (0, 1)):
                larger = (counts[0] + more[0], counts[1] + more[1])
                after = best_layout(table, larger, 6, objective)
                if before is not None:
                    assert after is not None
                    assert getattr(after, f"{objective}_s") <= getattr(before, f"{objective}_s")


def test_a_slower_link_never_lowers_the_optimum():
    """hexgen.md 5.2, monotone."""
    latencies = []
    for alpha in (1e-6, 1e-5, 1e-3, 1e-1):
        costs = costs_of(
            (("A4000", 2, "X"), ("A5000", 2, "X")), inside=Link(latency_s=alpha, bytes_per_s=12e9)
        )
        found = best_layout(costs.table(64, 32, 96), (2, 2), 40)
        assert found is not None
        latencies.append(found.latency_s)
    assert latencies == sorted(latencies) and latencies[0] < latencies[-1]


def test_asymmetric_is_never_slower_than_symmetric_and_gains_in_odd_groups():
    """hexgen.md 5.4, check 3: Norway's 3 + 3 accelerators with TP 2, 1, 2, 1 against six."""
    costs = costs_of((("3090Ti", 3, "N"), ("3090Ti", 3, "N")))
    table = costs.table(64, 128, 192)
    found, same = best_layout(table, (3, 3), 80), symmetric_layout(table, (3, 3), 80)
    assert found is not None and same is not None
    assert found.latency_s == pytest.approx(10.434, abs=5e-4)
    layers = {n: sorted(s.layers for s in found.stages if s.degree == n) for n in (1, 2)}
    assert layers[2] == [31, 31] and len(layers[1]) == 2 and sum(layers[1]) == 18
    assert same.latency_s == pytest.approx(16.70, abs=5e-3)
    assert [stage.layers for stage in same.stages] == [14, 14, 13, 13, 13, 13]
    random = np.random.default_rng(4)
    for _ in range(10):
        table = random_table(random, 2, 6, back=True)
        for objective in ("latency", "bottleneck"):
            same = symmetric_layout(table, (3, 2), 6, objective)
            found = best_layout(table, (3, 2), 6, objective)
            if same is not None:
                assert found is not None
                value = f"{objective}_s"
                assert getattr(found, value) <= getattr(same, value) * (1 + 1e-12)


def test_the_case_study_of_hexgen_md_1_5():
    """Section 5.4: asymmetric 2.4 times faster than an uneven pipeline of TP 1; the best uses the
    four large accelerators alone."""
    costs = costs_of(
        (("A6000", 4, "X"), ("A5000", 2, "X"), ("A4000", 2, "X")),
        inside=Link(latency_s=1e-5, bytes_per_s=12e9),
        same=Link(latency_s=5e-4, bytes_per_s=1.25e9),
    )
    table = costs.table(128, 32, 160)

    def latency(*stages):
        return table.layout(tuple(Stage(*stage) for stage in stages)).latency_s

    assert latency((0, 4, 48), (1, 2, 20), (2, 2, 12)) == pytest.approx(2.545, abs=5e-4)
    assert latency((0, 4, 44), (1, 2, 20), (2, 2, 16)) == pytest.approx(2.702, abs=5e-4)
    uneven = latency(*[(0, 1, 14)] * 4, *[(1, 1, 7)] * 2, *[(2, 1, 5)] * 2)
    assert uneven == pytest.approx(6.05, abs=5e-3)
    found = best_layout(table, (4, 2, 2), 80)
    assert found is not None and found.stages == (Stage(0, 4, 80),)
    assert found.latency_s == pytest.approx(1.745, abs=5e-4)


def test_nothing_to_plan_with_is_no_layout():
    table = random_table(np.random.default_rng(0), 2, 4, back=False)
    assert best_layout(table, (0, 0), 4) is None
    assert frontier(table, (0, 0), 4) == []
    assert isinstance(table.layout((Stage(0, 1, 4),)), Layout)
