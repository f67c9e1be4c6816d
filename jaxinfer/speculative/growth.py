"""How a tree grows level by level: which nodes have children, and where those stand.

Nothing here imports jax.
"""

import functools
from typing import NamedTuple

import numpy as np

from jaxinfer.speculative.topology import Topology, frozen


class Growth(NamedTuple):
    """How a level makes the next one: W new nodes from R parents, `breadth` at most from each.

    With `picks` [R, breadth] the drafts of each parent in rank order, the new level is
    `picks[row, column]`.
    """

    parents: np.ndarray
    """int32 [R], the nodes of the level that have children; subtract `level_bounds` for the place
    in the level."""
    breadth: int
    row: np.ndarray
    """int32 [W], which of `parents`."""
    column: np.ndarray
    """int32 [W], the rank."""


@functools.cache
def growth(topology: Topology) -> tuple[Growth, ...]:
    """For each level but the last, how the next level is made from it."""
    bounds, steps = topology.level_bounds, []
    for level in range(topology.levels - 1):
        start, end, last = (int(bound) for bound in bounds[level : level + 3])
        parents = start + np.flatnonzero(topology.child_count[start:end])
        row = np.searchsorted(parents, np.asarray(topology.parent[end:last]))
        breadth = int(topology.child_count[start:end].max())
        steps.append(Growth(frozen(parents), breadth, frozen(row), frozen(topology.rank[end:last])))
    return tuple(steps)
