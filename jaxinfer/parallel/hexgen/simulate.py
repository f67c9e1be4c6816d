"""`simulate`: requests replayed on a plan."""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from jaxinfer.arguments import of_kind, one_of, real, shown
from jaxinfer.parallel.hexgen.outcome import Simulation
from jaxinfer.parallel.hexgen.plan import Plan
from jaxinfer.parallel.hexgen.queues import line_of
from jaxinfer.parallel.hexgen.requests import whole_requests
from jaxinfer.parallel.hexgen.routing import Policy, Router
from jaxinfer.parallel.hexgen.tokens import TokenSimulator
from jaxinfer.parallel.hexgen.workload import Trace, Workload

Unit = Literal["requests", "tokens"]
UNITS: tuple[Unit, ...] = get_args(Unit)
RATES = (0.125, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)


def simulate(
    plan: Plan,
    trace: Trace,
    *,
    unit: Unit = "requests",
    router: Policy = "least_finish",
    losses: Sequence[tuple[float, str]] = (),
    seed: int = 0,
) -> Simulation:
    """What happens to every request of a trace.

    Args:
        plan: the replicas and the cost model.
        trace: the requests.
        unit: "requests" pass through the stages as a whole, without batching, as in the search;
            "tokens" batches them continuously: prompts when there is room for their caches, else
            one step of all rows.
        router: which replica a request goes to, see `jaxinfer.parallel.hexgen.routing`.
        losses: (seconds, name of a machine) that are lost; every replica with a stage there ends,
            and its requests begin again elsewhere.
        seed: of routers that draw lots.

    Raises:
        ValueError: an argument is out of range, or a request is larger than any replica's memory.
    """
    of_kind("plan", plan, Plan, "a Plan")
    of_kind("trace", trace, Trace, "a Trace")
    one_of("unit", unit, UNITS)
    ends = _ends(plan, losses)
    price = plan.cluster.price_per_hour
    if unit == "tokens":
        return TokenSimulator(plan, trace, Router(router, seed), ends).run(price)
    lengths = np.stack([trace.prompt, trace.output], -1)
    kinds, rows = np.unique(lengths, axis=0, return_inverse=True)
    lines = [line_of(plan.costs, stages, *kinds.T) for stages in plan.stages]
    return whole_requests(
        trace, lines, rows.reshape(-1).tolist(), Router(router, seed), ends, price
    )


def peak_rate(
    plan: Plan,
    workload: Workload,
    *,
    share: float = 0.99,
    rates: Sequence[float] = RATES,
    requests: int = 2000,
    seed: int = 0,
    unit: Unit = "requests",
) -> float | None:
    """The largest of some rates at which this share of requests meets the deadline; None if none.

    Every rate has the same requests, only closer together.
    """
    real("share", share, 0.0, 1.0)
    passed = None
    for rate in sorted(rates):
        load = Workload(
            requests_per_s=rate, deadline_s=workload.deadline_s, lengths=workload.lengths
        )
        found = simulate(plan, load.trace(requests, seed), unit=unit)
        if found.attainment(workload.deadline_s) >= share:
            passed = rate
    return passed


def _ends(plan: Plan, losses: Sequence[tuple[float, str]]) -> list[float]:
    """When each replica is lost."""
    names = {machine.name: i for i, machine in enumerate(plan.cluster.machines)}
    ends = [np.inf] * len(plan.replicas)
    for time, name in losses:
        real("the time of a loss", time, 0.0)
        if name not in names:
            raise ValueError(f"no machine of the plan is called {shown(name)}")
        for r, stages in enumerate(plan.stages):
            if any(one.machine == names[name] for one in stages):
                ends[r] = min(ends[r], float(time))
    return ends
