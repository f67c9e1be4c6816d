"""The clusters of the paper in the simulator, hexgen.md 5.4: order and regime, never 2.3x or 4x.

The links between regions are assumed there; the tables are those of another simulator.
"""

from functools import cache

import pytest

from jaxinfer.parallel.hexgen.costs import Assumptions, Costs
from jaxinfer.parallel.hexgen.inventory import Cluster, Link, Machine
from jaxinfer.parallel.hexgen.layouts import best_layout, symmetric_layout
from jaxinfer.parallel.hexgen.plan import Plan
from jaxinfer.parallel.hexgen.simulate import simulate
from jaxinfer.parallel.hexgen.sizes import ModelSizes
from jaxinfer.parallel.hexgen.workload import Workload
from tests.parallel.hexgen.clusters import GPUS, INSIDE, SAME

MODEL = ModelSizes.published(8192, 80)
LENGTHS = ((64, 128, 1.0),)
UNIT = 1.629  # seconds of a request alone on eight A100
FULL = (
    ("3090Ti", 8, "iceland"), ("3090Ti", 8, "iceland"), ("3090Ti", 3, "norway"),
    ("3090Ti", 3, "norway"), ("A5000", 8, "nevada"), ("A6000", 8, "illinois"),
    ("A6000", 8, "illinois"), ("A5000", 8, "illinois"), ("A40", 4, "illinois"),
)  # fmt: skip
FAR = {
    ("iceland", "norway"): (0.020, 1.25e8), ("illinois", "nevada"): (0.020, 1.25e8),
    ("iceland", "illinois"): (0.050, 6.25e7), ("norway", "illinois"): (0.055, 6.25e7),
    ("iceland", "nevada"): (0.070, 6.25e7), ("nevada", "norway"): (0.080, 6.25e7),
}  # fmt: skip


def machines(described, inside):
    return tuple(
        Machine(name=f"{region}{i}", gpu=GPUS[gpu], count=count, region=region, link=inside)
        for i, (gpu, count, region) in enumerate(described)
    )


def heterogeneous() -> Cluster:
    regions = {region for _, _, region in FULL}
    links = tuple(
        (one, other, Link(latency_s=latency, bytes_per_s=rate))
        for (one, other), (latency, rate) in FAR.items()
        if {one, other} <= regions
    )
    return Cluster(machines=machines(FULL, INSIDE), same_region=SAME, links=links)


def homogeneous() -> Cluster:
    nvlink = Link(latency_s=1e-6, bytes_per_s=200e9)
    network = Link(latency_s=2e-5, bytes_per_s=50e9)
    return Cluster(machines=machines([("A100", 8, "aws")] * 2, nvlink), same_region=network)


def load(rate: float, scale: float = 10.0) -> Workload:
    return Workload(requests_per_s=rate, deadline_s=scale * UNIT, lengths=LENGTHS)


def deployed(cluster: Cluster, groups, layout=best_layout, objective="latency") -> Plan:
    costs = Costs(cluster, MODEL, Assumptions.published())
    table = costs.table(64, 128, 192)
    found = [layout(table, counts, 80, objective) for counts in groups]
    return Plan.of(costs, load(1.0), [one.stages for one in found])


def of_machine(machine: int, count: int) -> tuple[int, ...]:
    return tuple(count * (m == machine) for m in range(len(FULL)))


NORWAY = (0, 0, 3, 3, 0, 0, 0, 0, 0)
TEN = [
    of_machine(0, 8), of_machine(1, 8), NORWAY, of_machine(4, 8), of_machine(5, 4),
    of_machine(5, 4), of_machine(6, 4), of_machine(6, 4), of_machine(7, 8), of_machine(8, 4),
]  # fmt: skip
WHOLE = [of_machine(m, FULL[m][1]) for m in (0, 1, 4, 5, 6, 7, 8)] + [NORWAY]


@cache
def plan(name: str) -> Plan:
    return {
        "2 x TP8": lambda: deployed(homogeneous(), [(8, 0), (0, 8)]),
        "4 x TP4": lambda: deployed(homogeneous(), [(4, 0), (4, 0), (0, 4), (0, 4)]),
        "full": lambda: deployed(heterogeneous(), TEN),
        "symmetric": lambda: deployed(heterogeneous(), TEN, symmetric_layout),
        "bottleneck": lambda: deployed(heterogeneous(), TEN, objective="bottleneck"),
        "one each": lambda: deployed(heterogeneous(), WHOLE),
        "without A40": lambda: deployed(heterogeneous(), TEN[:-1]),
    }[name]()


@cache
def least_scale(name: str, rate: float) -> float:
    return simulate(plan(name), load(rate).trace(3000, 0)).least_deadline(0.99) / UNIT


TABLE = {  # replicas, capacity, least scale at a rate of 0.5 and 2
    "2 x TP8": (2, 1.228, 2.15, 559.0),
    "4 x TP4": (4, 1.429, 2.38, 351.0),
    "full": (10, 2.136, 3.71, 10.7),
    "symmetric": (10, 2.178, 3.71, 13.6),
    "without A40": (9, None, 3.71, 19.9),
}


SLOW = ("4 x TP4", "symmetric", "without A40")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in TABLE]
)
def test_reference_table_of_hexgen_md_5_4(name):
    replicas, capacity, calm, busy = TABLE[name]
    assert len(plan(name).replicas) == replicas
    if capacity is not None:
        found = sum(1 / max(one["stage_s"]) for one in plan(name).predicted())
        assert found == pytest.approx(capacity, abs=6e-4)
    assert least_scale(name, 0.5) == pytest.approx(calm, rel=0.01)
    assert least_scale(name, 2.0) == pytest.approx(busy, rel=0.01)


def test_single_groups_of_hexgen_md_5_4():
    latencies = [one["latency_s"] for one in plan("full").predicted()]
    stated = [3.602, 3.602, 10.434, 4.230, 6.091, 6.091, 6.091, 6.091, 4.230, 6.647]
    assert latencies == pytest.approx(stated, abs=6e-4)
    a100 = [plan(name).predicted()[0]["latency_s"] for name in ("2 x TP8", "4 x TP4")]
    assert a100 == pytest.approx([1.629, 2.799], abs=6e-4)


def test_the_heterogeneous_cluster_wins_above_the_homogeneous_capacity():
    """Check 1: at low load the A100s win on the deadline; near and above their capacity they do
    not."""
    full = plan("full").capacity
    assert full >= 1.4 * max(plan(name).capacity for name in ("2 x TP8", "4 x TP4"))
    for name in ("2 x TP8",):
        assert least_scale(name, 0.5) < least_scale("full", 0.5)
        assert least_scale("full", 2.0) <= 0.1 * least_scale(name, 2.0)


@pytest.mark.slow
def test_bottleneck_layouts_serve_more_and_answer_later():
    found, full = plan("bottleneck"), plan("full")
    assert found.capacity == pytest.approx(2.950, rel=0.02) and found.capacity > full.capacity
    alone = [max(one["latency_s"] for one in x.predicted()) for x in (found, full)]
    assert alone[0] > 1.5 * alone[1]


def test_no_layout_puts_tensor_parallelism_across_machines():
    """Check 4; a stage has one machine, and nothing in a plan can say otherwise."""
    for stages in plan("full").replicas:
        assert all(stage.devices for stage in stages)
        regions = {FULL[stage.machine][2] for stage in stages}
        assert len(regions) == 1
