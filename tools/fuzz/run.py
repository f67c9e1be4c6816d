"""Shares inputs among processes, and watches them: an input may end or block its process."""

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tools.fuzz.limits import SILENCE
from tools.fuzz.target import Target
from tools.fuzz.worker import Bench, Finding, Input, work

POLL = 0.2  # seconds


def planned(targets: Sequence[Target], inputs: int) -> list[Input]:
    """So many inputs, shared among the targets by their `share` and well mixed."""
    total = sum(target.share for target in targets)
    found = []
    for target in targets:
        count = max(1, round(inputs * target.share / total))
        found += [(number / count, Input(target.name, number)) for number in range(count)]
    return [one for _, one in sorted(found)][:inputs]


@dataclass
class _Worker:
    """A process and its part of the plan; a new process goes on behind an input that ended it."""

    targets: Sequence[Target]
    plan: list[Input]
    seed: int
    context: Any = field(default_factory=lambda: multiprocessing.get_context("spawn"))

    def __post_init__(self):
        self.place, self.since = self.context.Value("q", 0), self.context.Value("d", 0.0)
        self.finished = False
        self._start()

    def _start(self) -> None:
        self.reports, sender = self.context.Pipe(duplex=False)
        self.since.value = 0.0
        arguments = (self.targets, self.plan, self.seed, self.place, self.since, sender)
        self.process = self.context.Process(target=work, args=arguments, daemon=True)
        self.process.start()
        sender.close()
        self.began = self.place.value

    def findings(self) -> Iterator[Finding]:
        """What is new; restarts the process if it has ended before its plan has."""
        ended = not self.process.is_alive()
        yield from self._reported(self.reports)
        if self.finished:
            return
        begun = self.since.value
        if begun and time.monotonic() - begun > SILENCE:
            self.process.kill()
            self.process.join()
            yield from self._lost(f"no answer after {SILENCE} s")
        elif ended:
            if begun:
                yield from self._lost(f"the process ended with {self.process.exitcode}")
            elif self.place.value == self.began:
                raise RuntimeError("a process of the fuzzer ended before its first input")
            else:
                self._start()

    def _reported(self, reports: Connection) -> Iterator[Finding]:
        try:
            while reports.poll():
                found = reports.recv()
                if found is None:
                    self.finished = True
                    return
                yield found
        except EOFError:
            return

    def _lost(self, error: str) -> Iterator[Finding]:
        """The input that was being read; the next process goes on behind it."""
        yield Finding(self.plan[self.place.value], error, "", b"")
        self.place.value += 1
        self._start()


def fuzz(
    targets: Sequence[Target], inputs: int, seed: int, processes: int | None = None
) -> Iterator[tuple[int, Finding | None]]:
    """Reads so many inputs; yields how many are done, with each finding as it comes."""
    plan = planned(targets, inputs)
    count = max(1, min(processes or os.cpu_count() or 1, len(plan)))
    workers = [_Worker(targets, plan[first::count], seed) for first in range(count)]
    try:
        while not all(worker.finished for worker in workers):
            time.sleep(POLL)
            for worker in workers:
                for finding in worker.findings():
                    yield sum(one.place.value for one in workers), finding
            yield sum(worker.place.value for worker in workers), None
    finally:
        for worker in workers:
            worker.process.kill()


def keep(finding: Finding, seed: int, folder: Path, targets: Sequence[Target]) -> Path:
    """Writes a finding into a folder of its own, from which `--replay` takes it."""
    place = folder / f"{finding.input.target}-{seed}-{finding.input.number}"
    place.mkdir(parents=True, exist_ok=True)
    file, content = finding.file, finding.content
    if not file:  # what ended a process could not say it
        target = next(one for one in targets if one.name == finding.input.target)
        file, content = drawn(target, seed, finding.input)
    record = {
        "target": finding.input.target, "seed": seed, "number": finding.input.number,
        "file": file, "error": finding.error,
    }  # fmt: skip
    (place / "content").write_bytes(content)
    (place / "finding.json").write_text(json.dumps(record, indent=2) + "\n")
    return place


def drawn(target: Target, seed: int, one: Input) -> tuple[str, bytes]:
    """The damaged file of an input, without reading it."""
    with tempfile.TemporaryDirectory() as folder:
        return Bench(Path(folder), [target]).draw(seed, one)


def replayed(place: Path, targets: Sequence[Target]) -> str | None:
    """What is wrong with a kept finding now; None if it is mended."""
    record = json.loads((place / "finding.json").read_text())
    (target,) = (one for one in targets if one.name == record["target"])
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), [target])
        return bench.try_out(target.name, record["file"], (place / "content").read_bytes())
