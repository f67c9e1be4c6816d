"""Requests followed token by token, with continuous batching (Orca, OSDI 2022).

A replica works in rounds. If requests wait and there is memory for the caches of the first of
them, a round reads their prompts, one behind the other through the stages; else it is one step of
all rows, in as many micro-batches as there are stages. A micro-batch passes all stages, and all of
them keep the slowest stage busy: a step takes the longer of the two.
"""

import heapq
from collections import deque
from collections.abc import Sequence

import numpy as np

from jaxinfer.parallel.hexgen.outcome import Simulation
from jaxinfer.parallel.hexgen.plan import Plan
from jaxinfer.parallel.hexgen.rounds import RoundTimes
from jaxinfer.parallel.hexgen.routing import Router
from jaxinfer.parallel.hexgen.workload import Trace

ROUND, LOSS, ARRIVAL = range(3)  # what comes first at the same time


class TokenSimulator:
    """One run of a trace on a plan.

    Args:
        plan: the replicas.
        trace: the requests.
        router: chooses the replica of every request.
        ends_s: when each replica is lost.

    Raises:
        ValueError: no replica has memory for one of the requests.
    """

    def __init__(self, plan: Plan, trace: Trace, router: Router, ends_s: Sequence[float]):
        self.trace, self.router, self.ends_s = trace, router, ends_s
        self.prompt, self.output = trace.prompt.tolist(), trace.output.tolist()
        self.replicas = [_Replica(RoundTimes(plan.costs, stages)) for stages in plan.stages]
        longest = int((trace.prompt + trace.output).max())
        if not any(one.times.fits(longest) for one in self.replicas):
            raise ValueError(
                f"a request of {longest} tokens is larger than any replica's memory for caches; "
                "plan for longer requests"
            )
        count = len(trace)
        self.emitted, self.retries = [0] * count, np.zeros(count, int)
        self.first, self.finish = np.full(count, np.nan), np.full(count, np.nan)
        self.replica = np.full(count, -1)

    def run(self, price_per_hour: float = 0.0) -> Simulation:
        """Every request to its end."""
        self.events = [(time, ARRIVAL, i) for i, time in enumerate(self.trace.arrival_s.tolist())]
        self.events += [(end, LOSS, r) for r, end in enumerate(self.ends_s) if end < np.inf]
        heapq.heapify(self.events)
        while self.events:
            time, what, which = heapq.heappop(self.events)
            if what == ARRIVAL:
                self._arrive(time, which)
            elif what == LOSS:
                self._lose(time, self.replicas[which])
            elif not self.replicas[which].is_lost:
                self._end_round(time, which)
        return Simulation(
            trace=self.trace,
            replica=self.replica,
            first_token_s=self.first,
            finish_s=self.finish,
            retries=self.retries,
            busy_s=tuple(tuple(one.busy) for one in self.replicas),
            price_per_hour=price_per_hour,
        )

    def _arrive(self, time: float, request: int) -> None:
        tokens = self.prompt[request] + self.output[request]
        alive = [
            r for r, one in enumerate(self.replicas) if not one.is_lost and one.times.fits(tokens)
        ]
        if not alive:
            return
        length = self._length(request)
        chosen = self.router.choose(
            alive,
            lambda r: self.replicas[r].finish_s(time, length, self.output[request]),
            lambda r: self.replicas[r].queued,
        )
        replica = self.replicas[chosen]
        replica.waiting.append(request)
        replica.waiting_tokens += length
        if not replica.in_round:
            self._begin_round(time, chosen)

    def _lose(self, time: float, replica: "_Replica") -> None:
        """The requests of a replica arrive again; tokens that were emitted are read with the
        prompt."""
        replica.is_lost = True
        for request in [*replica.rows, *replica.waiting]:
            self.retries[request] += 1
            heapq.heappush(self.events, (time, ARRIVAL, request))

    def _begin_round(self, time: float, which: int) -> None:
        replica = self.replicas[which]
        new = []
        while replica.waiting and replica.admit(self._tokens(replica.waiting[0])):
            new.append(replica.waiting.popleft())
        if new:
            lengths = [self._length(request) for request in new]
            replica.waiting_tokens -= sum(lengths)
            ends, busy = replica.times.prompts(lengths)
            replica.first = {r: time + end for r, end in zip(new, ends, strict=True)}
            replica.rows.update(dict.fromkeys(new))
            duration = ends[-1]
        elif replica.rows:
            context = sum(map(self._length, replica.rows)) / len(replica.rows)
            duration, busy = replica.times.step(len(replica.rows), context)
        else:
            return
        replica.in_round = True
        replica.busy = [a + b for a, b in zip(replica.busy, busy, strict=True)]
        heapq.heappush(self.events, (time + duration, ROUND, which))

    def _end_round(self, time: float, which: int) -> None:
        """A round of prompts gives their first tokens, each at its own time; a step one of every
        row."""
        replica = self.replicas[which]
        at = replica.first or dict.fromkeys(replica.rows, time)
        for request, when in at.items():
            self.emitted[request] += 1
            if self.emitted[request] == 1:
                self.first[request] = when
            if self.emitted[request] == self.output[request]:
                self.finish[request], self.replica[request] = when, which
                replica.release(request, self._tokens(request))
        replica.first, replica.in_round = {}, False
        self._begin_round(time, which)

    def _length(self, request: int) -> int:
        """Tokens that a row has."""
        return self.prompt[request] + self.emitted[request]

    def _tokens(self, request: int) -> int:
        """Tokens that it will have; its cache is reserved for them."""
        return self.prompt[request] + self.output[request]


class _Replica:
    """Requests that wait and those that have a row."""

    def __init__(self, times: RoundTimes):
        self.times = times
        self.waiting: deque[int] = deque()
        self.waiting_tokens = 0
        self.rows: dict[int, None] = {}  # in the order of admission
        self.first: dict[int, float] = {}  # of a round of prompts: when each is read
        self.used = np.zeros(len(times.stages))  # of every stage's memory for caches
        self.busy = [0.0] * len(times.stages)
        self.in_round = self.is_lost = False

    @property
    def queued(self) -> int:
        """Requests that are not finished."""
        return len(self.rows) + len(self.waiting)

    def finish_s(self, time: float, length: int, output: int) -> float:
        """When a request would be finished if nothing else came: all prompts are read, then it
        decodes beside all others."""
        read = self.waiting_tokens * self.times.prompt_s(length) / length if length else 0.0
        step, _ = self.times.step(self.queued + 1, length)
        return time + read + self.times.prompt_s(length) + output * step

    def admit(self, tokens: int) -> bool:
        """Whether there was memory for a row, which then is taken."""
        used = self.used + self.times.row_share(tokens)
        if (used > 1 + 1e-9).any():
            return False
        self.used = used
        return True

    def release(self, request: int, tokens: int) -> None:
        """A row is done."""
        del self.rows[request]
        self.used = self.used - self.times.row_share(tokens)
