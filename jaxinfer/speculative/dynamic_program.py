"""The tree shapes with the largest expected number of tokens, of every size at once.

Sequoia (arXiv 2402.12374, section 3.1 and the depth-limited variant of the appendix). A node is
accepted with the product of p over its path, so the value F of a tree is the sum of these products,
1 for the root. Let T[l, b, n] be the largest F of trees with exactly n nodes, at most l levels and
exactly b children of the root. Taking the last child off, with its subtree of m nodes, leaves a
tree of the same kind:

    T[l, b, n] = max over m of  T[l, b - 1, n - m] + p_b * max over j of T[l - 1, j, m]

No order of p is assumed: at low temperature a second child can be worth less than the third, and
then taking the best nodes first is not optimal. Time O(N^2 L B), with the maximum over m in one
NumPy operation; memory O(N L B + N^2). Nothing here imports jax.
"""

from dataclasses import dataclass

import numpy as np

TIE = 1e-12
"""A gain in expected tokens below this is rounding: the smaller tree wins."""


@dataclass(frozen=True, eq=False)
class OptimalTrees:
    """The tables for all sizes n <= N, and all level limits l <= L unless `limited` is false.

    Without a limit on levels there is one table, at index 0 of the first axis, for every l.
    """

    value: np.ndarray
    """float64 [L+1, N+1], the largest F of trees with exactly n nodes; -inf where there is none."""
    children: np.ndarray
    """int16 [L+1, N+1], how many children the root of that tree has."""
    split: np.ndarray
    """int16 [L+1, B+1, N+1], nodes in the subtree of the last child, given the child count."""
    limited: bool

    def size(self, nodes: int, levels: int) -> int:
        """Nodes of the best tree with at most `nodes` nodes and `levels` levels (more than L is L).

        Less than `nodes` where no such tree has exactly that many, or where more nodes gain nothing
        (7 nodes in 2 levels need 6 useful children of the root).
        """
        values = self._values(nodes, levels)
        return int(np.argmax(values >= values.max() - TIE))

    def expected(self, nodes: int, levels: int) -> float:
        """F of that tree: the expected tokens of one step, the bonus token included."""
        return float(self._values(nodes, levels)[self.size(nodes, levels)])

    def parents(self, nodes: int, levels: int) -> tuple[int, ...]:
        """That tree as the parent of each node, numbered breadth first; -1 for the root."""
        parents, pending = [-1], [(self.size(nodes, levels), self._row(levels))]
        for node, (size, row) in enumerate(pending):  # grows while it is read: a queue
            subtrees = []
            for rank in range(int(self.children[row, size]), 0, -1):
                subtrees.append(int(self.split[row, rank, size]))
                size -= subtrees[-1]
            for subtree in reversed(subtrees):
                parents.append(node)
                pending.append((subtree, row - 1 if self.limited else row))
        return tuple(parents)

    def _row(self, levels: int) -> int:
        return min(levels, len(self.value) - 1) if self.limited else 0

    def _values(self, nodes: int, levels: int) -> np.ndarray:
        return self.value[self._row(levels), : nodes + 1]


def solve(p: np.ndarray, nodes: int, levels: int | None, branching: int | None) -> OptimalTrees:
    """The tables up to `nodes` nodes and `levels` levels (None: no limit).

    `p` is float64 [B], or [depth, B] where acceptance changes with the depth of a child; row 0
    then holds the children of the root, and children below the last row are never accepted. With
    rows, only the answers for exactly `levels` levels are right: the tables of fewer levels belong
    to subtrees, whose acceptance is that of their depth (the paper runs the program again for each
    limit, and so must a caller).
    """
    if p.ndim == 2:
        levels = len(p) + 1 if levels is None else min(levels, len(p) + 1)
    useful = np.flatnonzero(p.max(axis=0) if p.ndim == 2 else p)
    most = int(useful[-1]) + 1 if len(useful) else 0  # later ranks are never accepted
    most = min(most, nodes - 1, most if branching is None else branching)
    p = p[..., :most]
    if levels is None:
        return _solve_any_depth(p, nodes)
    value = np.full((levels + 1, nodes + 1), -np.inf)
    value[1:, 1] = 1.0
    children = np.zeros(value.shape, np.int16)
    split = np.zeros((levels + 1, most + 1, nodes + 1), np.int16)
    for level in range(2, levels + 1):
        row = p[levels - level] if p.ndim == 2 else p
        table = np.full((most + 1, nodes + 1), -np.inf)
        table[0, 1] = 1.0
        for rank in range(1, most + 1):
            table[rank], split[level, rank] = _add_child(
                table[rank - 1], _scaled(row[rank - 1 : rank], value[level - 1])
            )
        children[level] = table.argmax(axis=0)
        value[level] = table.max(axis=0)
    return OptimalTrees(value=value, children=children, split=split, limited=True)


def _add_child(before: np.ndarray, gain: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """max and arg-max over m of before[n - m] + gain[m], for every n; all [N+1]."""
    size = len(before)
    padded = np.concatenate([np.full(size - 1, -np.inf), before])
    rest = np.lib.stride_tricks.sliding_window_view(padded, size)[:, ::-1]  # [n, m]: before[n - m]
    sums = rest + gain
    last = sums.argmax(axis=1)
    return sums[np.arange(size), last], last


def _solve_any_depth(p: np.ndarray, nodes: int) -> OptimalTrees:
    """One table, filled from small trees to large: a subtree is smaller than its tree."""
    most = len(p)
    table = np.full((most + 1, nodes + 1), -np.inf)
    table[0, 1] = 1.0
    value = np.full(nodes + 1, -np.inf)
    value[1] = 1.0
    children = np.zeros(nodes + 1, np.int16)
    split = np.zeros((most + 1, nodes + 1), np.int16)
    for size in range(2, nodes + 1 if most else 2):
        rest = table[:-1, size - 1 : 0 : -1]  # [b, m - 1]: the tree without its last child
        sums = rest + _scaled(p[:, None], value[None, 1:size])
        split[1:, size] = sums.argmax(axis=1) + 1
        table[1:, size] = sums.max(axis=1)
        children[size] = table[:, size].argmax()
        value[size] = table[:, size].max()
    return OptimalTrees(
        value=value[None], children=children[None], split=split[None], limited=False
    )


def _scaled(p: np.ndarray, value: np.ndarray) -> np.ndarray:
    """p * value, where impossible trees stay impossible (0 * -inf would be NaN)."""
    possible = np.isfinite(value)
    return np.where(possible, p * np.where(possible, value, 0.0), -np.inf)
