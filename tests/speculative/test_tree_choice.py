"""The hardware-aware choice of a tree, and its picture."""

import sys

import numpy as np
import pytest
from test_topology import LLAMA3

from jaxinfer.speculative.acceptance import Acceptance
from jaxinfer.speculative.expected import expected_tokens
from jaxinfer.speculative.optimizer import choose
from jaxinfer.speculative.plot import node_places, plot_tree
from jaxinfer.speculative.topology import Topology

SIZES = [2**k for k in range(9)]
DEVICES = {
    "GPU": {n: max(1.0, n / 160) for n in SIZES},
    "CPU": {n: max(1.0, n / 10) for n in SIZES},
    "offloading": dict.fromkeys(SIZES, 1.0),
}
# the vector that comes with the original code, up to rank 16
SAMPLE = [
    0.6342, 0.1079, 0.0570, 0.0225, 0.0195, 0.0150, 0.0045, 0.0030,
    0.0120, 0.0045, 0.0075, 0.0045, 0.0060, 0.0030, 0.0015, 0.0030,
]  # fmt: skip


@pytest.mark.parametrize(
    ("draft", "device", "speedup", "nodes", "levels"),
    [
        (0.01, "GPU", 5.7970, 128, 12),
        (0.05, "GPU", 4.2463, 128, 9),
        (0.1, "GPU", 3.2944, 128, 7),
        (0.3, "GPU", 1.8453, 128, 6),
        (0.01, "CPU", 3.5610, 8, 8),
        (0.05, "CPU", 2.8087, 8, 6),
        (0.1, "CPU", 2.3035, 8, 5),
        (0.3, "CPU", 1.4364, 8, 4),
        (0.01, "offloading", 6.3417, 256, 13),
        (0.05, "offloading", 4.5545, 256, 9),
        (0.1, "offloading", 3.5069, 256, 8),
        (0.3, "offloading", 1.9213, 256, 6),
    ],
)
def test_choices_of_the_synthetic_devices(draft, device, speedup, nodes, levels):
    choice = choose(LLAMA3, DEVICES[device], draft, 16, leaf_pass=True)
    assert abs(choice.speedup - speedup) <= 0.5001e-4
    assert (choice.topology.nodes, choice.topology.levels) == (nodes, levels)
    assert abs(choice.expected - expected_tokens(choice.topology, LLAMA3)) < 1e-12
    assert abs(choice.expected / choice.step_cost - choice.speedup) < 1e-12
    ours = choose(LLAMA3, DEVICES[device], draft, 16)
    assert ours.speedup > choice.speedup  # a draft pass less for the same tree


def test_the_demonstration_of_the_original_code_is_reproduced():
    times = {1: 10.0, 2: 10.0, 4: 10.0, 8: 12.0, 16: 14.0, 32: 18.0}
    choice = choose(SAMPLE, times, 0.3, 10, leaf_pass=True)
    # 0.3 is the draft's time, 10 the target's: c = 0.03
    assert choice.topology == Topology.chain(4)
    assert abs(choice.expected - 2.2914) < 1e-4


def test_without_a_gain_there_is_no_speculation():
    choice = choose([0.1, 0.05], {1: 10.0, 8: 12.0}, draft_time=5.0)
    assert choice.topology == Topology.chain(1)
    assert (choice.expected, choice.step_cost, choice.speedup) == (1.0, 10.0, 1.0)
    assert choice.candidates[0].speedup == 1.0
    assert all(one.speedup < 1 for one in choice.candidates[1:])


def test_the_table_holds_every_size_and_depth_and_the_best_of_them():
    choice = choose(LLAMA3, {1: 2.0, 4: 2.2, 8: 2.5}, 0.1, 6)
    pairs = [(one.nodes, one.levels) for one in choice.candidates]
    assert pairs == [(1, 1), (4, 2), (4, 3), (4, 4), *((8, levels) for levels in range(2, 7))]
    best = max(choice.candidates, key=lambda one: one.speedup)
    assert (best.speedup, best.expected) == (choice.speedup, choice.expected)
    for one in choice.candidates[1:]:
        tree = Topology.optimal(LLAMA3, one.nodes, one.levels)
        assert abs(expected_tokens(tree, LLAMA3) - one.expected) < 1e-12


def test_a_plain_step_may_cost_other_than_a_tree_of_one_node():
    slow = choose(LLAMA3, {8: 1.0}, 0.1, plain_time=1.0)
    fast = choose(LLAMA3, {8: 1.0}, 0.1, plain_time=0.5)
    assert slow.topology == fast.topology
    assert abs(slow.speedup - 2 * fast.speedup) < 1e-12


def test_acceptance_by_depth_is_searched_for_every_depth():
    rows = np.array([[0.8, 0.1], [0.5, 0.2], [0.1, 0.1]])
    choice = choose(Acceptance(p=tuple(map(tuple, rows.tolist()))), {1: 1.0, 8: 1.2}, 0.05, 10)
    for one in choice.candidates[1:]:
        tree = Topology.optimal(rows, one.nodes, one.levels)
        assert abs(expected_tokens(tree, rows) - one.expected) < 1e-12
    assert abs(choice.expected - expected_tokens(choice.topology, rows)) < 1e-12


@pytest.mark.parametrize(
    ("times", "draft", "levels", "message"),
    [
        ({}, 0.1, 4, "verify_times is empty"),
        ({8: 1.0}, 0.1, 4, "the time of a plain step is None"),
        ({1: 0.0}, 0.1, 4, "the time of 1 nodes is 0.0"),
        ({1: float("nan")}, 0.1, 4, "the time of 1 nodes is nan"),
        ({0: 1.0}, 0.1, 4, "size 0, expected 1 to 4096"),
        ({1: 1.0}, -0.1, 4, "draft_time is -0.1"),
        ({1: 1.0}, 0.1, 0, "max_levels is 0"),
    ],
)
def test_bad_measurements_are_named(times, draft, levels, message):
    with pytest.raises(ValueError, match=message):
        choose(LLAMA3, times, draft, levels)


# ---------------------------------------------------------------- the picture


@pytest.mark.parametrize("seed", range(6))
def test_nodes_stand_apart_and_edges_do_not_cross(seed):
    rng = np.random.default_rng(seed)
    tree = Topology.from_parents([-1, *(int(rng.integers(node)) for node in range(1, 60))])
    x = node_places(tree)
    for start, end in zip(tree.level_bounds, tree.level_bounds[1:], strict=False):
        assert (np.diff(x[start:end]) > 1 - 1e-9).all()  # in order of their parents: no crossing
    for node in np.flatnonzero(tree.child_count):
        first, last = tree.first_child[node], tree.first_child[node] + tree.child_count[node] - 1
        assert abs(x[node] - (x[first] + x[last]) / 2) < 1e-9


def test_pictures_are_whole_files(tmp_path):
    tree = Topology.optimal(LLAMA3, 16, 5)
    plot_tree(tree, tmp_path / "shaded.png", LLAMA3)
    plot_tree(tree, tmp_path / "again.png", LLAMA3)
    plot_tree(Topology.chain(1), tmp_path / "root.svg")
    assert {file.name for file in tmp_path.iterdir()} == {"shaded.png", "again.png", "root.svg"}
    shaded = (tmp_path / "shaded.png").read_bytes()
    assert shaded.startswith(b"\x89PNG") and shaded == (tmp_path / "again.png").read_bytes()
    with pytest.raises(ValueError, match="not supported"):
        plot_tree(tree, tmp_path / "tree.tree")
    assert len(list(tmp_path.iterdir())) == 3


def test_a_missing_matplotlib_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install 'jaxinfer\[plot\]'"):
        plot_tree(Topology.chain(2), tmp_path / "tree.png")
