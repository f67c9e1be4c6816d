"""One timer and interleaved rounds.

A measurement is a function that runs once and returns a mapping with "seconds" and, where it makes
sense, rates. The first call of each peer compiles, fills caches and is reported apart. After it the
peers take turns: round 1 A B C, round 2 A B C, ..., so a slow minute of the machine hits all of
them and the ratio of one round compares neighbours in time. Medians, ranges and every single round
are kept.
"""

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
