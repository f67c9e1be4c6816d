"""The perplexity of a stream as a curve: means over equally many tokens."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jaxinfer.typing import Json

Report = Callable[[int], None]
"""Told the tokens that have been read."""


@dataclass(frozen=True)
class Point:
    """`nll` is the mean over `count` tokens that end at token `end` of the stream, nats."""

    end: int
    count: int
    nll: float


@dataclass(frozen=True)
class Curve:
    """`points` have equally many tokens but the last. `cache_bytes` is the largest allocation,
    `stopped` says why the stream was not read to its end, "" where it was."""

    method: str
    points: list[Point]
    cache_bytes: int
    seconds: float
    chunk: int  # tokens read at once
    stopped: str = ""

    @property
    def tokens(self) -> int:
        """Scored tokens."""
        return sum(point.count for point in self.points)

    @property
    def nll(self) -> float:
        return sum(p.nll * p.count for p in self.points) / max(self.tokens, 1)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nll, 700.0))

    def metrics(self) -> Json:
        """What a table shows; `last` is the perplexity of the curve's last full point."""
        last = self.points[-2 if len(self.points) > 1 else -1]
        return {
            "tokens": self.tokens,
            "nll": self.nll,
            "perplexity": self.perplexity,
            "last": math.exp(min(last.nll, 700.0)),
            "tokens_per_s": self.tokens / max(self.seconds, 1e-9),
            "stopped": self.stopped,
        }


class Averages:
    """Means over `every` tokens, from pieces of any size."""

    def __init__(self, every: int):
        if every < 1:
            raise ValueError(f"every must be at least 1 token, got {every}")
        self.every, self.read = every, 0
        self.points: list[Point] = []
        self._sum, self._count = 0.0, 0

    def add(self, log_probs: np.ndarray, tokens: int) -> None:
        """`tokens` were read, of which the last len(log_probs) were scored."""
        self.read += tokens
        done = 0
        while done < len(log_probs):
            part = log_probs[done : done + self.every - self._count]
            done += len(part)
            self._sum -= float(np.sum(part, dtype=np.float64))
            self._count += len(part)
            if self._count == self.every:
                self._close(self.read - (len(log_probs) - done))

    def _close(self, end: int) -> None:
        self.points.append(Point(end, self._count, self._sum / self._count))
        self._sum, self._count = 0.0, 0

    def curve(
        self, method: str, cache_bytes: int, seconds: float, chunk: int, stopped: str
    ) -> Curve:
        if self._count:
            self._close(self.read)
        if not self.points:
            raise ValueError("nothing to score: the stream has fewer than 2 tokens")
        return Curve(method, self.points, cache_bytes, seconds, chunk, stopped)
