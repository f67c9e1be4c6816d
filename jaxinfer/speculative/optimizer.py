"""Which tree pays on this machine: size and depth from measured times.

A step with a tree costs the verification of its n nodes and one draft pass for each level that is
drafted from, and yields F tokens (Sequoia, arXiv 2402.12374, section 4.1). All measured sizes and
all depths are tried, and not speculating at all, which wins if nothing else is faster. Times may be
in any one unit. The measurements themselves are made elsewhere.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from jaxinfer.speculative.acceptance import Ranks, as_table
from jaxinfer.speculative.dynamic_program import OptimalTrees, solve
from jaxinfer.speculative.topology import MOST_NODES, Topology


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """The best tree within a size and a depth, and what it would bring."""

    nodes: int
    """The measured size, which is paid for even if the tree needs less."""
    levels: int
    """The limit on levels, the root's included; all of them are paid for."""
    expected: float
    """F, tokens of one step."""
    step_cost: float
    """Time of one step, in the unit of the measurements."""
    speedup: float
    """Tokens per time, relative to plain decoding."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The tree to use, and the table it was chosen from."""

    topology: Topology
    """One node means plain decoding."""
    expected: float
    step_cost: float
    speedup: float
    candidates: tuple[Candidate, ...]
    """All that were tried, in order of size, then depth; plain decoding first."""


def choose(
    acceptance: Ranks,
    verify_times: Mapping[int, float],
    draft_time: float,
    max_levels: int = 16,
    *,
    branching: int | None = None,
    plain_time: float | None = None,
    leaf_pass: bool = False,
) -> Choice:
    """The tree with the most tokens per time.

    Args:
        acceptance: as in `Topology.optimal`.
        verify_times: the time of a target pass for each number of tree nodes measured.
        draft_time: the time of one draft pass, whatever the width of the level.
        max_levels: deepest tree tried, in levels, the root's included.
        branching: most children of a node, unlimited without.
        plain_time: the time of one step of plain decoding; without it, `verify_times[1]`.
        leaf_pass: count a draft pass for the last level too, as the paper does. Our loop does
            without: an accepted leaf is read at the start of the next step.

    Raises:
        ValueError: for times that are not positive, sizes below 1, or without a plain time.

    Example:
        choose([0.8, 0.1], {1: 1.0, 8: 1.1}, draft_time=0.05).topology     # 8 nodes
    """
    sizes = _checked(verify_times, draft_time, max_levels)
    plain = verify_times.get(1) if plain_time is None else plain_time
    if plain is None or not (0 < plain < math.inf):
        raise ValueError(
            f"the time of a plain step is {plain}, expected a positive time: measure 1 node or "
            "give plain_time"
        )
    solved = _programs(acceptance, sizes[-1], max_levels, branching)
    tried = [Candidate(nodes=1, levels=1, expected=1.0, step_cost=plain, speedup=1.0)]
    for nodes in sizes:
        for levels in range(2, min(max_levels, nodes) + 1):
            expected = solved[levels].expected(nodes, levels)
            cost = verify_times[nodes] + draft_time * (levels if leaf_pass else levels - 1)
            tried.append(
                Candidate(
                    nodes=nodes,
                    levels=levels,
                    expected=expected,
                    step_cost=cost,
                    speedup=expected * plain / cost,
                )
            )
    best = max(tried, key=lambda candidate: candidate.speedup)  # the first of equals: the smallest
    parents = (-1,) if best.nodes == 1 else solved[best.levels].parents(best.nodes, best.levels)
    return Choice(
        topology=Topology(parents),
        expected=best.expected,
        step_cost=best.step_cost,
        speedup=best.speedup,
        candidates=tuple(tried),
    )


def _programs(
    acceptance: Ranks, nodes: int, max_levels: int, branching: int | None
) -> dict[int, OptimalTrees]:
    """The tables to read each number of levels from: one for all, unless p depends on depth."""
    table = as_table(acceptance)
    limits = range(2, min(max_levels, nodes) + 1)
    if table.ndim == 2:
        return {levels: solve(table, nodes, levels, branching) for levels in limits}
    return dict.fromkeys(limits, solve(table, nodes, min(max_levels, nodes), branching))


def _checked(verify_times: Mapping[int, float], draft_time: float, max_levels: int) -> list[int]:
    """The sizes in order, once all is as it should be."""
    if max_levels < 1:
        raise ValueError(f"max_levels is {max_levels}, expected 1 or more")
    if not (0 <= draft_time < math.inf):
        raise ValueError(f"draft_time is {draft_time}, expected a time of 0 or more")
    for nodes, time in verify_times.items():
        if not 1 <= nodes <= MOST_NODES:
            raise ValueError(f"verify_times has size {nodes}, expected 1 to {MOST_NODES} nodes")
        if not (0 < time < math.inf):
            raise ValueError(f"the time of {nodes} nodes is {time}, expected a positive time")
    if not verify_times:
        raise ValueError("verify_times is empty; measure at least one size")
    return sorted(verify_times)
