"""Whole requests through the pipelines of one plan, with routers and the loss of machines.

The recursion of `jaxinfer.parallel.hexgen.queues`, one request at a time: a request holds each
stage for all its tokens, and stages serve in the order of arrival. What a replica has not finished
when a machine of it is lost begins again elsewhere.
"""

import bisect
import heapq
from collections.abc import Sequence

import numpy as np

from jaxinfer.parallel.hexgen.outcome import Simulation
from jaxinfer.parallel.hexgen.queues import Line
from jaxinfer.parallel.hexgen.routing import Router
from jaxinfer.parallel.hexgen.workload import Trace


def whole_requests(
    trace: Trace,
    lines: Sequence[Line],
    kinds: Sequence[int],
    router: Router,
    ends_s: Sequence[float],
    price_per_hour: float = 0.0,
) -> Simulation:
    """Every request of a trace.

    Args:
        trace: the requests.
        lines: the replicas, as kinds of requests see them.
        kinds: of every request, the row in `lines`.
        router: chooses the replica when a request arrives, or begins again.
        ends_s: when each replica is lost; infinite for never.
        price_per_hour: of the machines.
    """
    count = len(trace)
    queues = [_Queue(line) for line in lines]
    replica, retries = np.full(count, -1), np.zeros(count, int)
    finish = np.full(count, np.nan)
    # (time, request): requests that begin again come in between those that arrive
    waiting = [(float(time), request) for request, time in enumerate(trace.arrival_s)]
    heapq.heapify(waiting)
    while waiting:
        time, request = heapq.heappop(waiting)
        alive = [r for r, end in enumerate(ends_s) if time < end]
        if not alive:
            continue
        kind = int(kinds[request])
        chosen = router.choose(
            alive,
            lambda r, time=time, kind=kind: queues[r].finish_s(time, kind),
            lambda r, time=time: queues[r].queued(time),
        )
        done = queues[chosen].put(time, kind, ends_s[chosen])
        if done > ends_s[chosen]:
            retries[request] += 1
            heapq.heappush(waiting, (ends_s[chosen], request))
        else:
            replica[request], finish[request] = chosen, done
    return Simulation(
        trace=trace,
        replica=replica,
        first_token_s=np.full(count, np.nan),
        finish_s=finish,
        retries=retries,
        busy_s=tuple(tuple(queue.busy) for queue in queues),
        price_per_hour=price_per_hour,
    )


class _Queue:
    """The stages of one replica: when each is free, and what it has done."""

    def __init__(self, line: Line):
        self.service, self.travel = line.service_s.tolist(), line.travel_s.tolist()
        stages = len(self.service[0])
        self.free, self.busy = [0.0] * stages, [0.0] * stages
        self.done: list[float] = []  # rising, as nobody overtakes

    def finish_s(self, time: float, kind: int) -> float:
        """When a request that comes now would be finished."""
        for free, hold, then in zip(self.free, self.service[kind], self.travel[kind], strict=True):
            time = max(time, free) + hold + then
        return time

    def put(self, time: float, kind: int, end: float) -> float:
        """Takes a request and returns when it is finished; `end` is when the replica is lost."""
        for s, (hold, then) in enumerate(zip(self.service[kind], self.travel[kind], strict=True)):
            start = max(time, self.free[s])
            self.free[s] = start + hold
            self.busy[s] += max(min(self.free[s], end) - start, 0.0)
            time = self.free[s] + then
        bisect.insort(self.done, time)
        return time

    def queued(self, time: float) -> int:
        """Requests that are not finished now."""
        return len(self.done) - bisect.bisect_right(self.done, time)
