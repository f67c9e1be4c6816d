"""`drill`: stages are killed while they serve, and every text must be what it is without that."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxinfer.arguments import whole
from jaxinfer.decode.batcher import Batcher
from jaxinfer.decode.sampling import Sampler
from jaxinfer.decode.ticket import Ticket
from jaxinfer.parallel.pipeline import Pipeline
from jaxinfer.progress import Report, silent
from jaxinfer.typing import Json

SAMPLERS = (Sampler(), Sampler(temperature=1.0, top_p=0.9))
LONGEST_S = 600.0  # of a round of requests, before it counts as lost
PAUSE_S = 1.0  # between a recovery and the next kill, at most
TWICE, BOTH = 0.15, 0.15  # the share of kills in a restart, and of two stages at once


@dataclass(frozen=True, kw_only=True)
class Drill:
    """What a drill has come to; seconds are from a kill to the next token that was drawn."""

    requests: int
    kills: int
    lost: int  # requests without an answer
    different: int  # answers with other tokens than the undisturbed ones
    journal: int  # requests that it still holds
    repairs: int
    recovery_s: tuple[float, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing was lost, changed or left behind."""
        return not (self.lost or self.different or self.journal)

    def to_dict(self) -> Json:
        """A JSON-ready dictionary."""
        seconds = sorted(self.recovery_s)
        median = float(np.median(seconds)) if seconds else None
        names = ("requests", "kills", "lost", "different", "journal", "repairs")
        return {name: getattr(self, name) for name in names} | {
            "passed": self.passed, "recovery_median_s": median, "recovery_s": seconds,
        }  # fmt: skip


def drill(
    batcher: Batcher,
    pipeline: Pipeline,
    prompts: Sequence[str | list[int]],
    *,
    kills: int,
    new_tokens: int = 32,
    seed: int = 0,
    report: Report = silent,
) -> Drill:
    """Asks for the same texts again and again while stages die at random moments.

    Args:
        batcher: of the pipeline; it has room for all prompts.
        pipeline: whose stages are processes of this machine.
        prompts: of the requests, half of them sampled.
        kills: stages that are killed: in prompts, in steps, while they start again, two at once.
        new_tokens: of each answer.
        seed: of moments and stages.
        report: is told of every kill.
    """
    whole("kills", kills)

    def ask() -> list[Ticket]:
        return [
            batcher.submit(
                prompt, sampler=SAMPLERS[i % 2], seed=i, max_new_tokens=new_tokens,
                ignore_eos=True,
            )
            for i, prompt in enumerate(prompts)
        ]  # fmt: skip

    expected = [ticket.result(LONGEST_S).tokens for ticket in ask()]
    killer = _Killer(pipeline, kills, np.random.default_rng(seed), report)
    before, requests, lost, different = pipeline.ring.repairs, 0, 0, 0
    killer.start()
    try:
        while killer.is_alive():
            for ticket, tokens in zip(ask(), expected, strict=True):
                requests += 1
                try:
                    different += ticket.result(LONGEST_S).tokens != tokens
                except Exception:  # whatever it is, nobody got an answer
                    lost += 1
    finally:
        killer.stopped.set()
        killer.join()
    return Drill(
        requests=requests, kills=killer.done, lost=lost, different=different,
        journal=len(pipeline.journal), repairs=pipeline.ring.repairs - before,
        recovery_s=tuple(killer.recovery_s),
    )  # fmt: skip


class _Killer(threading.Thread):
    """Kills stages one after the other, each when the pipeline draws again after the last."""

    def __init__(self, pipeline: Pipeline, kills: int, rng: np.random.Generator, report: Report):
        super().__init__(name="jaxinfer-chaos", daemon=True)
        self._pipeline, self._kills, self._rng, self._report = pipeline, kills, rng, report
        self.stopped = threading.Event()
        self.done, self.recovery_s = 0, list[float]()

    def run(self) -> None:
        ring, rng = self._pipeline.ring, self._rng
        while self.done < self._kills and not self.stopped.wait(rng.uniform(0, PAUSE_S)):
            incarnation, start = ring.incarnation, time.monotonic()
            self._kill(1 + (rng.random() < BOTH and len(ring.processes) > 1))
            if rng.random() < TWICE and self.done < self._kills:
                self._until(lambda was=incarnation: ring.incarnation > was)
                self._kill(1)
            self._report("kills", self.done, self._kills)
            drawn = None
            while not self.stopped.is_set():
                if ring.incarnation > incarnation and drawn is None:
                    drawn = self._pipeline.draws
                if drawn is not None and self._pipeline.draws > drawn:
                    self.recovery_s.append(time.monotonic() - start)
                    break
                time.sleep(0.01)

    def _until(self, true) -> None:
        while not true() and not self.stopped.wait(0.01):
            pass

    def _kill(self, count: int) -> None:
        processes = self._pipeline.ring.processes
        for number in self._rng.choice(len(processes), count, replace=False):
            if processes[number].alive and self.done < self._kills:
                processes[number].kill()
                self.done += 1
