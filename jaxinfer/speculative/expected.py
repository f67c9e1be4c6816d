"""What a tree is expected to bring: the probability that each node is accepted, and their sum F.

Sequoia (arXiv 2402.12374, section 3.1). Nothing here imports jax.
"""

import numpy as np
from jaxtyping import Float64

from jaxinfer.arguments import of_kind
from jaxinfer.speculative.acceptance import Ranks, as_table
from jaxinfer.speculative.topology import Topology


def path_probabilities(topology: Topology, acceptance: Ranks) -> Float64[np.ndarray, "M"]:
    """The probability that each node is accepted: the product of p over its path, 1 for the root.

    `acceptance` as in `Topology.optimal`; ranks and depths beyond it are never accepted.
    """
    of_kind("topology", topology, Topology, "a Topology")
    table = as_table(acceptance)
    rows = table if table.ndim == 2 else np.broadcast_to(table, (topology.levels, len(table)))
    depth, rank = topology.depth, topology.rank
    path = np.ones(topology.nodes)
    for node in range(1, topology.nodes):
        row, column = int(depth[node]) - 1, int(rank[node])
        known = row < rows.shape[0] and column < rows.shape[1]
        path[node] = path[topology.parent[node]] * rows[row, column] if known else 0.0
    return path


def expected_tokens(topology: Topology, acceptance: Ranks) -> float:
    """F, the expected tokens of one step: accepted drafts and the one token always emitted.

    Exact if acceptance depends on nothing but the rank (and the depth, with rows).

    Args:
        topology: the tree that is drafted.
        acceptance: p_k, as in `Topology.optimal`; ranks and depths beyond it are never accepted.

    Returns:
        At least 1, and at most the tree's levels.

    Raises:
        ValueError: for values that are not such probabilities.

    Example:
        >>> from jaxinfer.speculative import Topology, expected_tokens
        >>> expected_tokens(Topology.chain(3), [0.5])
        1.75
    """
    return float(path_probabilities(topology, acceptance).sum())
