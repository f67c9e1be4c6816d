"""`schedule`: the plan with which a cluster serves a workload best."""

from typing import Literal, get_args

from jaxinfer.arguments import of_kind, one_of, whole
from jaxinfer.config import ModelConfig
from jaxinfer.parallel.hexgen.costs import GIB, Assumptions, Costs
from jaxinfer.parallel.hexgen.groups import Budget, Gene, Genome, Groups, Rules, search
from jaxinfer.parallel.hexgen.inventory import Cluster
from jaxinfer.parallel.hexgen.layouts import Stage
from jaxinfer.parallel.hexgen.plan import Plan
from jaxinfer.parallel.hexgen.sizes import ModelSizes
from jaxinfer.parallel.hexgen.starts import partitions, starting_points
from jaxinfer.parallel.hexgen.workload import MOST_REQUESTS, Workload
from jaxinfer.progress import Report, silent

Method = Literal["genetic", "exhaustive", "start"]
METHODS: tuple[Method, ...] = get_args(Method)
MOST_EXHAUSTIVE = 12  # accelerators; beyond, partitions are too many to try


def schedule(
    cluster: Cluster,
    model: ModelSizes | ModelConfig,
    workload: Workload,
    *,
    method: Method = "genetic",
    budget: Budget | None = None,
    seed: int = 0,
    assumptions: Assumptions | None = None,
    rules: Rules | None = None,
    requests: int = 600,
    start: Plan | None = None,
    report: Report = silent,
) -> Plan:
    """The plan that most requests of the workload meet their deadline with.

    Args:
        cluster: the machines.
        model: its sizes, or a config, which then has a full cache in bfloat16.
        workload: the requests that are expected.
        method: "genetic" searches groups of accelerators; "exhaustive" tries them all, on a small
            cluster; "start" takes the first division that can serve.
        budget: size and length of the genetic search.
        seed: of requests and search; equal seeds give equal plans, unless `budget.seconds` ends the
            search.
        assumptions: of the cost model.
        rules: which groups may be formed.
        requests: simulated for each candidate.
        start: a plan of the same machines to begin from, as when some are lost.
        report: is told of every generation.

    Raises:
        ValueError: no group of accelerators can hold the model, or an argument is out of range.

    Example:
        >>> from jaxinfer.parallel.hexgen import Gpu, Link, Machine
        >>> gpu = Gpu(name="a5000", memory_bytes=24e9, bytes_per_s=768e9, flops_per_s=111e12)
        >>> inside = Link(latency_s=5e-6, bytes_per_s=12e9)
        >>> box = Machine(name="box", gpu=gpu, count=4, region="here", link=inside)
        >>> load = Workload(requests_per_s=2.0, deadline_s=4.0, lengths=((64, 32, 1.0),))
        >>> model = ModelSizes.published(hidden=4096, layers=32)
        >>> plan = schedule(Cluster(machines=(box,)), model, load, method="exhaustive")
        >>> len(plan.replicas), plan.attainment
        (1, 1.0)
    """
    one_of("method", method, METHODS)
    of_kind("cluster", cluster, Cluster, "a Cluster")
    of_kind("workload", workload, Workload, "a Workload")
    of_kind("model", model, (ModelSizes, ModelConfig), "ModelSizes or a ModelConfig")
    requests = whole("requests", requests, 1, MOST_REQUESTS)
    sizes = ModelSizes.of(model) if isinstance(model, ModelConfig) else model
    costs = Costs(cluster, sizes, assumptions or Assumptions())
    groups = Groups(costs, workload, rules or Rules(), requests, seed)
    if method == "exhaustive":
        found = _exhaustive(groups)
    else:
        starts = _starts(groups, start)
        found = starts[0]
        if method == "genetic":
            found, _ = search(groups, starts, budget or Budget(), seed, report)
    return plan_of(groups, found)


def plan_of(groups: Groups, genome: Genome) -> Plan:
    """The plan of a candidate, with what it attained."""
    layouts = [groups.layout(gene) for gene in genome]
    pipelines = [layout.stages for layout in layouts if layout is not None]
    return Plan.of(groups.costs, groups.workload, pipelines, groups.attainment(genome))


def _exhaustive(groups: Groups) -> Genome:
    if sum(groups.counts) > MOST_EXHAUSTIVE:
        raise ValueError(
            f"method 'exhaustive' tries at most {MOST_EXHAUSTIVE} accelerators, the cluster has "
            f"{sum(groups.counts)}; use 'genetic'"
        )
    genomes = list(partitions(groups))
    if not genomes:
        raise ValueError(_nothing_fits(groups))
    fitness = groups.fitness(genomes)
    return min(zip(fitness, genomes, strict=True), key=lambda one: (-one[0], one[1]))[1]


def _starts(groups: Groups, start: Plan | None) -> list[Genome]:
    starts = starting_points(groups)
    if start is not None:
        kept = surviving(groups, start)
        starts = [kept, *starts] if groups.is_feasible(kept) else starts
    if not starts:
        raise ValueError(_nothing_fits(groups))
    return starts


def surviving(groups: Groups, plan: Plan) -> Genome:
    """The groups of a plan that the cluster still has accelerators for.

    Raises:
        ValueError: the plan has other machines.
    """
    names = [machine.name for machine in plan.cluster.machines]
    if names != [machine.name for machine in groups.costs.cluster.machines]:
        raise ValueError("start is a plan of other machines; leave it out, or give its cluster")
    left, kept = list(groups.counts), list[Gene]()
    for stages in plan.stages:
        counts = [0] * len(left)
        for one in stages:
            counts[one.machine] += one.degree
        if all(count <= free for count, free in zip(counts, left, strict=True)):
            left = [free - count for count, free in zip(counts, left, strict=True)]
            genes: list[Gene] = [(tuple(counts), one) for one in groups.rules.objectives]
            same = [gene for gene in genes if _stages(groups, gene) == stages]
            kept.append((same or genes)[0])
    return tuple(sorted(kept))


def _stages(groups: Groups, gene: Gene) -> tuple[Stage, ...] | None:
    layout = groups.layout(gene)
    return None if layout is None else layout.stages


def _nothing_fits(groups: Groups) -> str:
    machines = range(len(groups.counts))
    room = sum(groups.costs.room_bytes(m) * groups.counts[m] for m in machines)
    needed = groups.costs.model.weight_bytes
    return (
        f"no group of accelerators can hold the model of {needed / GIB:.1f} GiB, its caches and "
        f"buffers; all of them have {room / GIB:.1f} GiB to plan with, and a group may span "
        f"{groups.rules.most_machines} machines"
    )
