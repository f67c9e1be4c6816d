"""Which accelerators form a replica: a genetic search over partitions of the cluster.

HexGen (arXiv 2311.11514, section 4.2). A candidate is a set of groups, each a count of
accelerators per machine with the objective of its layout; what no group has stays idle. Children
merge and split groups and move accelerators between them; a group's layout comes from the dynamic
programme and is remembered; a candidate's fitness is the part of simulated requests that meet the
deadline, and of equal ones the mean latency. All candidates see the same requests. The best ones
survive, and some of each generation are random.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, get_args

import numpy as np

from jaxinfer.arguments import flag, one_of, real, whole
from jaxinfer.parallel.hexgen.costs import Costs
from jaxinfer.parallel.hexgen.layouts import Counts, Layout, Objective, best_layout
from jaxinfer.parallel.hexgen.queues import Line, collapsed, latencies, line_of
from jaxinfer.parallel.hexgen.workload import Workload
from jaxinfer.progress import Report, silent

Gene: TypeAlias = tuple[Counts, Objective]
Genome: TypeAlias = tuple[Gene, ...]
"""Sorted, so that equal candidates are one."""

TIE = 1e-6  # of fitness for a second of mean latency: decides between equal attainment
ATTEMPTS = 20  # to find a mutation that is feasible


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long the search may take.

    Args:
        generations: at most so many.
        population: candidates that live at a time.
        elites: of them that survive unchanged.
        immigrants: of each generation that come from random walks.
        patience: generations without gain after which the search ends.
        seconds: after which it ends, too; None for no such limit, which alone makes equal seeds
            give equal plans on every machine.
    """

    generations: int = 80
    population: int = 40
    elites: int = 8
    immigrants: int = 4
    patience: int = 40
    seconds: float | None = None

    def __post_init__(self):
        whole("generations", self.generations, 0, 10**6)
        whole("population", self.population, 2, 10**5)
        whole("elites", self.elites, 1, self.population - 1)
        whole("immigrants", self.immigrants, 0, self.population - self.elites)
        whole("patience", self.patience, 1, 10**6)
        if self.seconds is not None:
            real("seconds", self.seconds, 0.0, 1e9)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Which groups may be formed.

    Args:
        use_all: every accelerator of the cluster, and of each group, has to be used.
        across_regions: a group may have machines of several regions.
        most_machines: of a group.
        objectives: for which a group's layout may be the best.
    """

    use_all: bool = False
    across_regions: bool = True
    most_machines: int = 3
    objectives: tuple[Objective, ...] = ("latency", "bottleneck")

    def __post_init__(self):
        flag("use_all", self.use_all)
        flag("across_regions", self.across_regions)
        whole("most_machines", self.most_machines)
        for one in self.objectives:
            one_of("objectives", one, get_args(Objective))
        whole("the number of objectives", len(self.objectives))


@dataclass
class Groups:
    """Groups of one cluster, their layouts, and what candidates made of them achieve."""

    costs: Costs
    workload: Workload
    rules: Rules = field(default_factory=Rules)
    requests: int = 600
    seed: int = 0

    def __post_init__(self):
        load, cluster = self.workload, self.costs.cluster
        self.table = self.costs.table(load.mean_prompt, load.mean_output, load.context)
        self.trace = load.trace(self.requests, self.seed)
        lengths = np.stack([self.trace.prompt, self.trace.output], -1)
        self.lengths, kinds = np.unique(lengths, axis=0, return_inverse=True)
        self.kinds = kinds.reshape(-1)
        rooms = [max(self.costs.room_bytes(m), 0.0) for m in range(len(cluster.machines))]
        self._rooms, self._regions = np.array(rooms), [m.region for m in cluster.machines]
        self._layouts: dict[Gene, Layout | None] = {}
        self._lines: dict[Gene, Line] = {}
        self._fitness: dict[Genome, float] = {}
        self.evaluated = 0

    @property
    def counts(self) -> Counts:
        """All accelerators, per machine."""
        return self.costs.cluster.counts

    def layout(self, gene: Gene) -> Layout | None:
        """A group's pipeline; None if the rules forbid it or the model does not fit."""
        if gene not in self._layouts:
            self._layouts[gene] = self._found(gene)
        return self._layouts[gene]

    def _found(self, gene: Gene) -> Layout | None:
        counts, objective = gene
        used = [m for m, count in enumerate(counts) if count]
        if len(used) > self.rules.most_machines:
            return None
        if not self.rules.across_regions and len({self._regions[m] for m in used}) > 1:
            return None
        if np.dot(counts, self._rooms) < self.costs.model.weight_bytes:
            return None
        return best_layout(
            self.table, counts, self.costs.model.layers, objective, use_all=self.rules.use_all
        )

    def is_feasible(self, genome: Genome) -> bool:
        """Whether every group has a pipeline and, with `use_all`, none is idle."""
        if not genome or (self.rules.use_all and any(self.idle(genome))):
            return False
        return all(self.layout(gene) is not None for gene in genome)

    def idle(self, genome: Genome) -> Counts:
        """Accelerators in no group."""
        used = np.sum([counts for counts, _ in genome], axis=0)
        return tuple(int(n) for n in np.array(self.counts) - used)

    def line(self, gene: Gene) -> Line:
        """A group's pipeline as the requests see it."""
        if gene not in self._lines:
            layout = self.layout(gene)
            assert layout is not None
            self._lines[gene] = collapsed(line_of(self.costs, layout.stages, *self.lengths.T))
        return self._lines[gene]

    def attainment(self, genome: Genome) -> float:
        """The part of the requests that meets the deadline."""
        lines = [[self.line(gene) for gene in genome]]
        found = latencies(self.trace.arrival_s, self.kinds, lines)
        return float((found <= self.workload.deadline_s).mean())

    def fitness(self, genomes: Sequence[Genome]) -> list[float]:
        """The attainment of candidates, less a little for their mean latency."""
        new = [genome for genome in dict.fromkeys(genomes) if genome not in self._fitness]
        if new:
            lines = [[self.line(gene) for gene in genome] for genome in new]
            found = latencies(self.trace.arrival_s, self.kinds, lines)
            attained = (found <= self.workload.deadline_s).mean(0) - TIE * found.mean(0)
            self._fitness.update(zip(new, map(float, attained), strict=True))
            self.evaluated += len(new)
        return [self._fitness[genome] for genome in genomes]


def search(
    groups: Groups,
    starts: Sequence[Genome],
    budget: Budget = Budget(),
    seed: int = 0,
    report: Report = silent,
) -> tuple[Genome, list[float]]:
    """The best candidate that the genetic search finds, and the best fitness per generation.

    Args:
        groups: with the rules and the requests.
        starts: feasible candidates to begin from.
        budget: its size and length.
        seed: equal seeds give equal results.
        report: is told of every generation.
    """
    random = np.random.default_rng(seed)
    began, best = time.monotonic(), []
    living = list(dict.fromkeys(starts))
    living += [_walk(groups, random, starts) for _ in range(budget.population - len(living))]
    unique: list[tuple[float, Genome]] = []
    for generation in range(budget.generations + 1):
        ranked = sorted(
            zip(groups.fitness(living), living, strict=True), key=lambda one: (-one[0], one[1])
        )
        unique = list(dict.fromkeys(ranked))
        best.append(unique[0][0])
        report("plans", generation, budget.generations, f"{best[-1]:.3f}")
        stale = len(best) > budget.patience and best[-1] <= best[-1 - budget.patience]
        late = budget.seconds is not None and time.monotonic() - began > budget.seconds
        if stale or late or generation == budget.generations:
            break
        living = [genome for _, genome in unique[: budget.elites]]
        living += [_walk(groups, random, starts) for _ in range(budget.immigrants)]
        while len(living) < budget.population:
            rivals = random.integers(len(unique), size=3)
            child = unique[int(rivals.min())][1]  # of three by lot, the best
            living.append(mutated(groups, random, child))
    return unique[0][1], best


def _walk(groups: Groups, random: np.random.Generator, starts: Sequence[Genome]) -> Genome:
    """A random candidate: some mutations away from one of the starts."""
    genome = starts[int(random.integers(len(starts)))]
    for _ in range(random.integers(1, 9)):
        genome = mutated(groups, random, genome)
    return genome


def mutated(groups: Groups, random: np.random.Generator, genome: Genome) -> Genome:
    """A feasible neighbour, one to three changes away: two groups merged, one split, accelerators
    moved between groups or to and from the idle ones, or the layout for the other objective.

    Only the last of the changes has to be feasible. After some attempts it is the candidate itself.
    """
    for _ in range(ATTEMPTS):
        child = genome
        for _ in range(random.integers(1, 4)):
            genes = list(child) or list(genome)  # all had become idle
            random.shuffle(genes)
            found = MUTATIONS[random.integers(len(MUTATIONS))](groups, random, genes)
            child = tuple(sorted(gene for gene in found if any(gene[0])))
        if child != genome and groups.is_feasible(child):
            return child
    return genome


def _merge(groups: Groups, random: np.random.Generator, genes: list[Gene]) -> list[Gene]:
    if len(genes) < 2:
        return genes
    (one, objective), (other, _), *rest = genes
    return [(_sum(one, other), objective), *rest]


def _split(groups: Groups, random: np.random.Generator, genes: list[Gene]) -> list[Gene]:
    (counts, objective), *rest = genes
    part = tuple(int(random.integers(count + 1)) for count in counts)
    return [(part, objective), (_sum(counts, part, -1), objective), *rest]


def _move(groups: Groups, random: np.random.Generator, genes: list[Gene]) -> list[Gene]:
    """Some accelerators of one machine from a group to another, and now and then others back. The
    idle ones count as a group."""
    parts = [counts for counts, _ in genes]
    if not groups.rules.use_all:
        parts.append(groups.idle(tuple(genes)))
    if len(parts) < 2:
        return genes
    one, other = random.permutation(len(parts))[:2]
    given = _some(random, parts[one])
    back = _some(random, parts[other]) if random.random() < 0.5 else (0,) * len(given)
    parts[one] = _sum(_sum(parts[one], given, -1), back)
    parts[other] = _sum(_sum(parts[other], back, -1), given)
    return [(counts, gene[1]) for counts, gene in zip(parts, genes, strict=False)]


def _some(random: np.random.Generator, counts: Counts) -> Counts:
    """A random number of accelerators of a random machine of a group."""
    full = [machine for machine, count in enumerate(counts) if count]
    machine = full[random.integers(len(full))] if full else 0
    number = int(random.integers(1, counts[machine] + 1)) if full else 0
    return tuple(number * (m == machine) for m in range(len(counts)))


def _relayout(groups: Groups, random: np.random.Generator, genes: list[Gene]) -> list[Gene]:
    (counts, _), *rest = genes
    known = groups.rules.objectives
    return [(counts, known[random.integers(len(known))]), *rest]


def _sum(one: Counts, other: Counts, sign: int = 1) -> Counts:
    return tuple(a + sign * b for a, b in zip(one, other, strict=True))


Mutation: TypeAlias = Callable[[Groups, np.random.Generator, list[Gene]], list[Gene]]
MUTATIONS: tuple[Mutation, ...] = (_merge, _split, _move, _move, _relayout)
