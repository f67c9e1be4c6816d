"""Whole requests in pipelines of first-come, first-served stages, for many plans at once.

A request visits every stage once and holds it for all its tokens, as in AlpaServe's simulator (OSDI
2023), by which HexGen judges plans (arXiv 2311.11514, section 4.2). Times are known when a
request arrives, so that its finish is a recursion over the stages, and NumPy walks through the
arrivals once for every candidate of a search. Links and stages keep the order of the requests: none
overtakes another.

Letters: B request, C candidate plan, R replica, S stage, K kind of request.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxinfer.parallel.hexgen.costs import Costs
from jaxinfer.parallel.hexgen.layouts import Stage


class Line(NamedTuple):
    """A pipeline as kinds of requests see it.

    `service_s[k, s]` is how long a request of kind k holds stage s, `travel_s[k, s]` the time from
    there to the next stage, or behind the last stage until its tokens have come back.
    """

    service_s: NDArray[np.float64]  # [K, S]
    travel_s: NDArray[np.float64]  # [K, S]


def line_of(costs: Costs, stages: tuple[Stage, ...], prompt, output) -> Line:
    """The times of requests of `prompt[K]` and `output[K]` tokens in a pipeline."""
    service, travel = [], []
    for i, (m, n, layers) in enumerate(stages):
        is_last = i + 1 == len(stages)
        service.append(costs.stage_s(m, n, layers, is_last, prompt, output))
        if not is_last:
            travel.append(costs.request_hop_s(m, stages[i + 1].machine, prompt, output))
        elif i:
            travel.append(costs.back_s(m, stages[0].machine, output))
        else:
            travel.append(np.zeros(np.shape(prompt)))
    return Line(np.stack(service, -1), np.stack(travel, -1))


def collapsed(line: Line) -> Line:
    """The same finishing times from a single stage, where there is one kind of request.

    Stages that hold every request equally long let them out at the pace of the slowest: the n-th
    is done at the later of its arrival + all times, and the n-1-th + the slowest stage's time.
    """
    if len(line.service_s) > 1:
        return line
    slowest = line.service_s.max(-1, keepdims=True)
    total = line.service_s.sum(-1, keepdims=True) + line.travel_s.sum(-1, keepdims=True)
    return Line(slowest, total - slowest)


def latencies(
    arrival_s: NDArray[np.float64], kinds: NDArray[np.int64], candidates: list[list[Line]]
) -> NDArray[np.float64]:
    """Seconds from arrival to the last token of every request, in every candidate: [B, C].

    Each request goes to the replica that would finish it first; of equal ones to the first.
    """
    service, travel = _stacked(candidates)  # [K, S, C, R]
    free = np.zeros(service.shape[1:])
    each, found = np.arange(len(candidates)), np.empty((len(arrival_s), len(candidates)))
    for i, (arrival, kind) in enumerate(zip(arrival_s, kinds, strict=True)):
        time, ends = np.full(free.shape[1:], arrival), np.empty_like(free)
        for s, (hold, then) in enumerate(zip(service[kind], travel[kind], strict=True)):
            ends[s] = np.maximum(time, free[s]) + hold
            time = ends[s] + then
        chosen = time.argmin(-1)
        free[:, each, chosen] = ends[:, each, chosen]
        found[i] = time[each, chosen] - arrival
    return found


def _stacked(candidates: list[list[Line]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Service and travel as [K, S, C, R]: stages that are not there stand in front and take no
    time, replicas that are not there never finish."""
    kinds = len(candidates[0][0].service_s)
    stages = max(line.service_s.shape[1] for lines in candidates for line in lines)
    shape = kinds, stages, len(candidates), max(map(len, candidates))
    service, travel = np.full(shape, np.inf), np.zeros(shape)
    for c, lines in enumerate(candidates):
        for r, line in enumerate(lines):
            count = line.service_s.shape[1]
            service[:, :, c, r] = 0.0
            service[:, stages - count :, c, r] = line.service_s
            travel[:, stages - count :, c, r] = line.travel_s
    return service, travel
