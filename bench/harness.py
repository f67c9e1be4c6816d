"""One timer, interleaved rounds, and the JSON Lines records that every routine writes.

A measurement is a function that runs once and returns a mapping with "seconds" and, where it makes
sense, rates. The first call of each peer compiles, fills caches and is reported apart. After it the
peers take turns: round 1 A B C, round 2 A B C, ..., so a slow minute of the machine hits all of
them and the ratio of one round compares neighbours in time. Medians, ranges and every single round
are kept.
"""

import dataclasses
import datetime
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

Measure = Callable[[], Mapping[str, Any]]


def synchronise(result: Any) -> Any:
    """`result` once every array in it has been computed; only jax computes behind our back."""
    jax = sys.modules.get("jax")
    return result if jax is None else jax.block_until_ready(result)


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until the result is there, and the result."""
    start = time.perf_counter()
    result = synchronise(function())
    return time.perf_counter() - start, result


@dataclass
class Samples:
    """All calls of one peer: the first one, which compiles, and the measured rounds."""

    first: Mapping[str, Any]
    first_s: float
    rounds: list[Mapping[str, Any]] = field(default_factory=list)

    def values(self, key: str) -> list[float]:
        return [float(measured[key]) for measured in self.rounds]

    def median(self, key: str) -> float:
        return statistics.median(self.values(key))

    def summary(self, *keys: str) -> dict[str, Any]:
        """JSON-ready: for each key the median, range and rounds."""
        return {"first_s": self.first_s} | {key: summarise(self.values(key)) for key in keys}


def interleave(
    peers: Mapping[str, Measure], rounds: int, say: Callable[[str], None] = lambda _: None
) -> dict[str, Samples]:
    """Runs each peer once unmeasured, then `rounds` times in turn; never two at a time."""
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    samples = {}
    for name, measure in peers.items():
        say(f"{name}: first call")
        seconds, first = timed(measure)
        samples[name] = Samples(first, seconds)
    for index in range(rounds):
        for name, measure in peers.items():
            say(f"round {index + 1}/{rounds}: {name}")
            samples[name].rounds.append(measure())
    return samples


def summarise(values: Sequence[float]) -> dict[str, Any]:
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "rounds": list(values),
    }


def ratio(ours: Samples, peer: Samples, key: str) -> dict[str, Any]:
    """`ours / peer` round by round; above 1 is good for us when `key` is a rate."""
    pairs = zip(ours.values(key), peer.values(key), strict=True)
    return summarise([mine / theirs for mine, theirs in pairs])


@dataclass(frozen=True, kw_only=True)
class Record:
    """One line of a results file. `config` says what was measured and is its identity."""

    name: str
    config: dict[str, Any]
    metrics: dict[str, Any]
    env: dict[str, Any]
    command: str
    seed: int
    time: str = field(
        default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    )

    def to_json(self) -> str:
        return json.dumps(_rounded(dataclasses.asdict(self)), allow_nan=False)


def append(record: Record, folder: Path = RESULTS) -> Path:
    """Adds the record to `folder/NAME.jsonl` in one write.

    A process killed in a write leaves at most one broken last line; the next record starts on a new
    line and `read_records` skips what does not parse.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record.name}.jsonl"
    line = record.to_json().encode() + b"\n"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        os.write(descriptor, line)
    finally:
        os.close(descriptor)
    return path


def read_records(folder: Path = RESULTS) -> list[Record]:
    """Every record in the folder's files, in the order of writing."""
    names = {f.name for f in dataclasses.fields(Record)}
    records = []
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                data = json.loads(line)
            except ValueError:
                continue
            if isinstance(data, dict) and names <= set(data):
                records.append(Record(**{name: data[name] for name in names}))
    return records


def latest(records: Sequence[Record]) -> list[Record]:
    """The last record of every name and config."""
    found = {(r.name, json.dumps(r.config, sort_keys=True)): r for r in records}
    return list(found.values())


def _rounded(value: Any) -> Any:
    """Six digits are enough; JSON has no NaN, so a number that is not finite becomes null."""
    if isinstance(value, dict):
        return {str(key): _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
