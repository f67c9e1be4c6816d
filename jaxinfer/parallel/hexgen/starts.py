"""Where the search over groups begins, and all partitions of a cluster that is small.

HexGen clusters the accelerators by their communication (arXiv 2311.11514, section 4.2). Here
machines are joined step by step, those with the fastest links first, and the tree is cut wherever
the parts can hold the model.
"""

from collections.abc import Iterator

import numpy as np

from jaxinfer.parallel.hexgen.groups import Gene, Genome, Groups
from jaxinfer.parallel.hexgen.layouts import Counts


def starting_points(groups: Groups) -> list[Genome]:
    """Feasible candidates: the finest cut of the tree of machines, and its cuts into k parts.

    In the finest one a machine that can hold the model is a group; one that cannot is joined with
    those next to it until they can.
    """
    merges = _merges(groups)
    parts: list[Counts] = [_only(groups, m) for m in range(len(groups.counts))]
    finest: list[list[Gene]] = [_if_feasible(groups, part) for part in parts]
    living = [i for i, part in enumerate(parts) if any(part)]
    cuts = [[parts[i] for i in living]]
    for one, other in merges:
        joined = tuple(a + b for a, b in zip(parts[one], parts[other], strict=True))
        alone, both = [finest[one], finest[other]], _if_feasible(groups, joined)
        finest.append(alone[0] + alone[1] if all(alone) or not both else both)
        parts.append(joined)
        living = [i for i in living if i not in (one, other)] + [len(parts) - 1]
        cuts.append([parts[i] for i in living if any(parts[i])])
    objective = groups.rules.objectives[0]
    found = [finest[-1], *([(part, objective) for part in cut] for cut in cuts)]
    genomes = dict.fromkeys(tuple(sorted(genes)) for genes in found)
    return [genome for genome in genomes if groups.is_feasible(genome)]


def partitions(groups: Groups) -> Iterator[Genome]:
    """All feasible candidates whose groups have the layout of the first objective."""
    objective = groups.rules.objectives[0]
    for parts in set_partitions(groups.counts, complete=groups.rules.use_all):
        genome: Genome = tuple(sorted((part, objective) for part in parts))
        if groups.is_feasible(genome):
            yield genome


def set_partitions(
    counts: Counts, *, complete: bool = True, most: Counts | None = None
) -> Iterator[tuple[Counts, ...]]:
    """All ways to divide accelerators into groups, each as falling counts; without `complete` also
    those that leave some out."""
    if not complete or not any(counts):
        yield ()
    for first in np.ndindex(*(count + 1 for count in counts)):
        if any(first) and (most is None or first <= most):
            left = tuple(count - taken for count, taken in zip(counts, first, strict=True))
            for rest in set_partitions(left, complete=complete, most=first):
                yield (first, *rest)


def _merges(groups: Groups) -> list[tuple[int, int]]:
    """Pairs to join, the closest first; the i-th pair is part len(machines) + i from then on."""
    count = len(groups.counts)
    if count == 1:
        return []
    from scipy.cluster.hierarchy import linkage

    hops = np.log(np.maximum(groups.table.hop_s, 1e-12))
    pairs = hops[np.triu_indices(count, 1)]
    tree = linkage(pairs - pairs.min(), "average")
    return [(int(one), int(other)) for one, other, *_ in tree]


def _only(groups: Groups, machine: int) -> Counts:
    return tuple(count * (m == machine) for m, count in enumerate(groups.counts))


def _if_feasible(groups: Groups, counts: Counts) -> list[Gene]:
    gene: Gene = (counts, groups.rules.objectives[0])
    return [gene] if any(counts) and groups.layout(gene) is not None else []
