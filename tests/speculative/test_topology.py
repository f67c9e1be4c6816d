"""Tree shapes: the optimum against brute force and best-first search, and derived arrays."""

import heapq
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.speculative.dynamic_program import solve
from jaxinfer.speculative.expected import expected_tokens, path_probabilities
from jaxinfer.speculative.growth import growth
from jaxinfer.speculative.topology import Topology

# arXiv 2402.12374, appendix E: Llama3-8B drafting for Llama3-70B-Instruct, cut to 16 ranks
LLAMA3 = [
    0.7732, 0.1039, 0.0402, 0.0206, 0.0128, 0.0081, 0.0064, 0.0043,
    0.0035, 0.0026, 0.0025, 0.0021, 0.0016, 0.0014, 0.0010, 0.0010,
]  # fmt: skip

PARENTS = st.lists(st.integers(0, 10**6), max_size=30).map(
    lambda values: [-1, *(value % node for node, value in enumerate(values, start=1))]
)
"""Trees whose parents come first, otherwise in any order."""


def random_ranks(seed: int, ranks: int = 4) -> np.ndarray:
    """Acceptance of 4 ranks; every second one in falling order."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(ranks)) * rng.uniform(0.5, 1)
    return np.sort(p)[::-1] if seed % 2 else p


@cache
def ordered_trees(nodes: int) -> list[tuple]:
    """All ordered trees of a size, a node as the tuple of its children."""
    return [children for children in forests(nodes - 1)]


@cache
def forests(nodes: int) -> list[tuple]:
    if not nodes:
        return [()]
    return [
        (first, *rest)
        for size in range(1, nodes + 1)
        for first in ordered_trees(size)
        for rest in forests(nodes - size)
    ]


def levels_of(tree: tuple) -> int:
    return 1 + max(map(levels_of, tree), default=0)


def widest(tree: tuple) -> int:
    return max(len(tree), *map(widest, tree), 0)


def value(tree: tuple, p: np.ndarray, depth: int = 0) -> np.ndarray:
    """F of a tree for many p at once, [cases, ranks] or [cases, depth, ranks]."""
    total = np.ones(len(p))
    for rank, child in enumerate(tree):
        row = p if p.ndim == 2 else p[:, depth]
        total = total + row[:, rank] * value(child, p, depth + 1)
    return total


def brute_force(p: np.ndarray, nodes: int, levels: int, branching: int) -> np.ndarray:
    """The largest F of trees with exactly `nodes` nodes, for each case; -inf without any."""
    best = np.full(len(p), -np.inf)
    for tree in ordered_trees(nodes):
        if levels_of(tree) <= levels and widest(tree) <= branching:
            best = np.maximum(best, value(tree, p))
    return best


def best_first(p, nodes: int, levels: int) -> float:
    """F by taking the likeliest nodes first, which is optimal for falling p."""
    heap, total = [(-1.0, 0, 1.0, 0)], 0.0  # score, rank, score of the parent, depth
    while heap and nodes:
        score, rank, above, depth = heapq.heappop(heap)
        total, nodes = total - score, nodes - 1
        if depth and rank + 1 < len(p):
            heapq.heappush(heap, (-above * p[rank + 1], rank + 1, above, depth))
        if depth + 1 < levels:
            heapq.heappush(heap, (score * p[0], 0, -score, depth + 1))
    return total


def test_trees_are_counted_by_the_catalan_numbers():
    assert [len(ordered_trees(n)) for n in range(1, 9)] == [1, 1, 2, 5, 14, 42, 132, 429]


def test_the_optimum_equals_brute_force_over_all_ordered_trees():
    cases = np.stack([random_ranks(seed) for seed in range(60)])
    best = {(n, lv): brute_force(cases, n, lv, 4) for n in range(1, 9) for lv in range(1, 9)}
    for index, p in enumerate(cases):
        shared = solve(p, 8, 8, None)  # smaller answers are read from the largest table
        for (nodes, levels), values in best.items():
            exact = values[index]
            np.testing.assert_allclose(shared.value[levels, nodes], exact, rtol=0, atol=1e-12)
            tree = Topology(shared.parents(nodes, levels))
            at_most = max(best[n, levels][index] for n in range(1, nodes + 1))
            assert abs(expected_tokens(tree, p) - at_most) < 1e-12
            assert abs(shared.expected(nodes, levels) - at_most) < 1e-12
            if index < 6:
                own = Topology.optimal(p, nodes, levels)
                assert abs(expected_tokens(own, p) - at_most) < 1e-12
            assert tree.levels <= levels and tree.nodes <= nodes
            assert tree.nodes == nodes or exact < at_most
    for index, p in enumerate(cases[:10]):
        unlimited = solve(p, 8, None, None)
        for nodes in range(1, 9):
            assert abs(unlimited.value[0, nodes] - best[nodes, 8][index]) < 1e-12


@pytest.mark.parametrize("branching", [1, 2, 3])
def test_a_branching_limit_equals_brute_force(branching):
    cases = np.stack([random_ranks(seed) for seed in range(8)])
    for nodes in range(1, 8):
        for levels in (2, 3, 7):
            best = [brute_force(cases, n, levels, branching) for n in range(1, nodes + 1)]
            for index, p in enumerate(cases):
                tree = Topology.optimal(p, nodes, levels, branching)
                assert tree.branching <= branching
                assert abs(expected_tokens(tree, p) - max(b[index] for b in best)) < 1e-12


@pytest.mark.parametrize("levels", [2, 3, 4, 6, None])
def test_acceptance_by_depth_equals_brute_force(levels):
    rng = np.random.default_rng(7)
    cases = rng.dirichlet(np.ones(4), size=(10, 4))[..., :3]  # [case, depth, rank]: 5 levels known
    limit = min(levels or 5, 5)
    best = [brute_force(cases, n, limit, 3) for n in range(1, 8)]
    for index, p in enumerate(cases):
        for nodes in range(1, 8):
            tree = Topology.optimal(p, nodes, levels)
            assert tree.levels <= limit
            at_most = max(b[index] for b in best[:nodes])
            assert abs(expected_tokens(tree, p) - at_most) < 1e-12


def test_equal_rows_give_the_tree_of_one_row():
    for levels in (2, 4, 6):
        rows = np.tile(LLAMA3, (levels - 1, 1))
        assert Topology.optimal(rows, 32, levels) == Topology.optimal(LLAMA3, 32, levels)


@pytest.mark.parametrize(
    ("p", "nodes", "levels", "expected", "widths"),
    [
        ((0.6, 0.2, 0.1), 5, None, 2.376, (1, 2, 1, 1)),
        ((0.6, 0.2, 0.1), 5, 3, 2.28, (1, 2, 2)),
        ((0.4, 0.3, 0.2), 7, None, 2.30, (1, 3, 3)),
        ((0.8, 0.1, 0.05), 8, 3, 2.79, (1, 3, 4)),
        ((0.8, 0.1, 0.05), 8, None, 4.1611392, (1,) * 8),
        ((0.3, 0.05, 0.6), 4, None, 1.95, (1, 3)),
        ((0.5, 0.5), 7, None, 3.0, (1, 2, 4)),
        ((0.5, 0.25), 7, 2, 1.75, (1, 2)),  # 7 nodes do not fit: at most
        ((0.6, 0.0, 0.0), 6, 2, 1.6, (1, 1)),  # children that are never accepted are left out
        ((0.0, 0.0), 6, None, 1.0, (1,)),
        ((0.9,), 1, None, 1.0, (1,)),
        ((0.9,), 5, 1, 1.0, (1,)),
    ],
)
def test_trees_worked_out_by_hand(p, nodes, levels, expected, widths):
    tree = Topology.optimal(p, nodes, levels)
    assert tree.widths == widths
    assert abs(expected_tokens(tree, p) - expected) < 1e-12


def test_values_grow_with_size_where_ranks_are_out_of_order():
    p = (0.3, 0.05, 0.6)
    values = [expected_tokens(Topology.optimal(p, n), p) for n in range(1, 9)]
    np.testing.assert_allclose(
        values, [1, 1.3, 1.39, 1.95, 2.13, 2.22, 2.52, 2.628], rtol=0, atol=1e-12
    )
    assert abs(best_first(p, 4, 9) - 1.44) < 1e-12  # why the programme is needed


@pytest.mark.parametrize(
    ("nodes", "values"),
    [
        (8, (1.9652, 2.7069, 3.1600, 3.6513, 3.8459, 3.8459, 3.8459)),
        (16, (1.9842, 2.8338, 3.4587, 4.1101, 4.3929, 4.5376, 4.5376)),
        (32, (None, 2.9041, 3.6399, 4.5651, 4.9493, 5.1964, 5.2199)),
        (64, (None, 2.9443, 3.7649, 4.8931, 5.4918, 5.8459, 5.9163)),
        (128, (None, 2.9541, 3.8482, 5.1668, 5.9216, 6.4927, 6.5917)),
        (256, (None, 2.9558, 3.8882, 5.3796, 6.3125, 7.0888, 7.2551)),
    ],
)
def test_values_of_the_llama3_vector(nodes, values):
    trees = solve(np.array(LLAMA3), 256, 16, None)
    for levels, expected in zip((2, 3, 4, 6, 8, 12, 16), values, strict=True):
        exact = trees.value[levels, nodes]
        assert np.isneginf(exact) if expected is None else abs(exact - expected) <= 0.5001e-4


@pytest.mark.parametrize(
    ("nodes", "widths"),
    [
        (16, (1, 2, 3, 3, 1, 1, 1, 1, 1, 1, 1)),
        (32, (1, 3, 5, 4, 5, 6, 1, 1, 1, 1, 1, 1, 1, 1)),
    ],
)
def test_level_widths_of_the_llama3_vector(nodes, widths):
    assert Topology.optimal(LLAMA3, nodes, 16).widths == widths


@pytest.mark.parametrize("seed", range(1, 60, 4))
def test_best_first_is_as_good_for_falling_ranks(seed):
    p = random_ranks(seed, ranks=6)
    for nodes, levels in ((5, 3), (12, 4), (40, 5), (40, 40), (90, 9)):
        tree = Topology.optimal(p, nodes, levels)
        assert abs(expected_tokens(tree, p) - best_first(p, nodes, levels)) < 1e-11


def test_chains_have_their_closed_forms():
    p, total = LLAMA3[0], sum(LLAMA3[:5])
    several = expected_tokens(Topology.k_chains(5, 8), LLAMA3)
    assert abs(several - (1 + total * (1 - p**8) / (1 - p))) < 1e-12
    assert abs(several - 4.6563) < 1e-4
    one = expected_tokens(Topology.chain(9), LLAMA3)
    assert abs(one - (1 - p**9) / (1 - p)) < 1e-12
    assert Topology.k_chains(1, 8) == Topology.chain(9)
    assert Topology.k_chains(5, 8).nodes == 41 and Topology.chain(1).nodes == 1


def test_what_lies_beyond_the_measured_ranks_and_depths_is_never_accepted():
    star = Topology.from_children([[], [], []])
    assert path_probabilities(star, [0.5, 0.2]).tolist() == [1, 0.5, 0.2, 0]
    chain = Topology.chain(4)
    assert path_probabilities(chain, [[0.5], [0.4]]).tolist() == [1, 0.5, 0.2, 0]


# ---------------------------------------------------------------- derived arrays


def test_derived_arrays_of_a_small_tree():
    tree = Topology.from_children([[[], []], [], [[[]]]])
    assert tree.parent == (-1, 0, 0, 0, 1, 1, 3, 6)
    assert tree.depth.tolist() == [0, 1, 1, 1, 2, 2, 2, 3]
    assert tree.rank.tolist() == [0, 0, 1, 2, 0, 1, 0, 0]
    assert tree.child_count.tolist() == [3, 2, 0, 1, 0, 0, 1, 0]
    assert tree.first_child.tolist() == [1, 4, 0, 6, 0, 0, 7, 0]
    assert tree.level_bounds.tolist() == [0, 1, 4, 7, 8]
    assert (tree.nodes, tree.levels, tree.branching) == (8, 4, 3)
    assert np.flatnonzero(tree.ancestors[7]).tolist() == [0, 3, 6, 7]
    second = growth(tree)[1]
    assert second.parents.tolist() == [1, 3] and second.breadth == 2
    assert second.row.tolist() == [0, 0, 1] and second.column.tolist() == [0, 1, 0]
    assert str(tree) == "8 nodes, 4 levels, widths 1,3,3,1"
    assert str(Topology.chain(1)) == "1 node, 1 level, widths 1"


@given(PARENTS)
def test_derived_arrays_keep_their_invariants(parents):
    tree = Topology.from_parents(parents)
    assert tree.nodes == len(parents) == sum(tree.widths)
    for node in range(tree.nodes):
        first, count = int(tree.first_child[node]), int(tree.child_count[node])
        assert [tree.parent[child] for child in range(first, first + count)] == [node] * count
        assert tree.rank[first : first + count].tolist() == list(range(count)) or not count
        start, end = tree.level_bounds[tree.depth[node] :][:2]
        assert start <= node < end
    for node, above in enumerate(tree.parent[1:], start=1):
        own = np.eye(tree.nodes, dtype=bool)[node]
        assert (tree.ancestors[node] == (tree.ancestors[above] | own)).all()
        assert tree.depth[node] == tree.depth[above] + 1
    new = [
        (step.parents[row], column)
        for step in growth(tree)
        for row, column in zip(step.row, step.column, strict=True)
    ]
    assert new == list(zip(tree.parent[1:], tree.rank[1:], strict=True))
    assert all(step.column.max() < step.breadth for step in growth(tree))


@given(PARENTS, st.randoms())
def test_any_numbering_gives_the_same_shape(parents, random):
    tree, order = Topology.from_parents(parents), list(range(len(parents)))
    random.shuffle(order)  # order[old] is the new name
    shuffled: list[int] = [0] * len(parents)
    for old, above in enumerate(parents):
        shuffled[order[old]] = -1 if above < 0 else order[above]
    again = Topology.from_parents(shuffled)
    assert again.widths == tree.widths
    assert sorted(again.child_count.tolist()) == sorted(tree.child_count.tolist())


def test_siblings_keep_the_order_of_their_listing():
    tree = Topology.from_parents([2, 0, -1, 2])  # the root's children are nodes 0 and 3
    assert tree.parent == (-1, 0, 0, 1)


def test_equal_trees_hash_equally_and_their_arrays_are_read_only():
    tree, other = Topology.chain(3), Topology.from_parents(np.array([-1, 0, 1]))
    assert tree == other and hash(tree) == hash(other) and tree != Topology.chain(4)
    for array in (tree.depth, tree.ancestors, tree.rank, growth(tree)[0].row):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
