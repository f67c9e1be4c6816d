"""What happened to the requests of a simulation, and the figures that are drawn from it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jaxinfer.arguments import real
from jaxinfer.parallel.hexgen.workload import Trace
from jaxinfer.typing import Json

PERCENTILES = 50, 90, 99


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """Times of every request, and how busy each stage was. B requests; NaN where there is no time.

    A lost request has `replica` -1 and never finishes. `first_token_s` is known where requests are
    followed token by token.
    """

    trace: Trace
    replica: NDArray[np.int64]  # [B] that served it last
    first_token_s: NDArray[np.float64]  # [B] when
    finish_s: NDArray[np.float64]  # [B] when
    retries: NDArray[np.int64]  # [B] how often it began again, as its replica was lost
    busy_s: tuple[tuple[float, ...], ...]  # of every stage of every replica
    price_per_hour: float = 0.0

    @property
    def latency_s(self) -> NDArray[np.float64]:
        """[B] from arrival to the last token; infinite for lost requests."""
        return np.where(self.replica < 0, np.inf, self.finish_s - self.trace.arrival_s)

    @property
    def lost(self) -> int:
        """Requests that no replica was left for."""
        return int((self.replica < 0).sum())

    @property
    def duration_s(self) -> float:
        """From 0 s to the last token of all."""
        return float(np.max(self.finish_s, where=self.replica >= 0, initial=0.0))

    @property
    def time_to_first_token_s(self) -> NDArray[np.float64]:
        """[B] from arrival to the first token."""
        return self.first_token_s - self.trace.arrival_s

    @property
    def time_per_token_s(self) -> NDArray[np.float64]:
        """[B] mean time of the tokens behind the first; NaN for an output of one token."""
        more = np.where(self.trace.output > 1, self.trace.output - 1, np.nan)
        return (self.finish_s - self.first_token_s) / more

    def attainment(self, deadline_s: float) -> float:
        """The part of the requests that took `deadline_s` at most."""
        real("deadline_s", deadline_s, 0.0)
        return float((self.latency_s <= deadline_s).mean())

    def least_deadline(self, share: float = 0.99) -> float:
        """The shortest deadline that this part of the requests meets; infinite if too many are
        lost."""
        real("share", share, 0.0, 1.0)
        return float(np.quantile(self.latency_s, share, method="inverted_cdf"))

    @property
    def utilization(self) -> tuple[tuple[float, ...], ...]:
        """The part of the duration that every stage of every replica was busy."""
        whole = max(self.duration_s, 1e-300)
        return tuple(tuple(busy / whole for busy in stages) for stages in self.busy_s)

    @property
    def price_per_million_tokens(self) -> float:
        """Of output, all machines paid for the whole duration."""
        tokens = float(self.trace.output[self.replica >= 0].sum())
        paid = self.price_per_hour * self.duration_s / 3600
        return paid / tokens * 1e6 if tokens else np.inf

    def to_dict(self, deadline_s: float | None = None) -> Json:
        """The figures, JSON-ready; times that are infinite are None."""
        found: Json = {
            "requests": len(self.trace),
            "lost": self.lost,
            "retried": int((self.retries > 0).sum()),
            "duration_s": self.duration_s,
            "latency_s": _percentiles(self.latency_s),
            "least_deadline_s": {str(p): _finite(self.least_deadline(p / 100)) for p in (90, 99)},
            "utilization": [list(stages) for stages in self.utilization],
            "price_per_million_tokens": _finite(self.price_per_million_tokens),
        }
        if not np.isnan(self.first_token_s).all():
            found["time_to_first_token_s"] = _percentiles(self.time_to_first_token_s)
            found["time_per_token_s"] = _percentiles(self.time_per_token_s)
        if deadline_s is not None:
            found |= {"deadline_s": deadline_s, "attainment": self.attainment(deadline_s)}
        return found


def _percentiles(times: NDArray[np.float64]) -> Json:
    known = times[~np.isnan(times)]
    if not len(known):
        return {}
    values: Sequence[float] = np.percentile(known, PERCENTILES, method="inverted_cdf").tolist()
    found = {str(p): _finite(value) for p, value in zip(PERCENTILES, values, strict=True)}
    return found | {"mean": _finite(float(known.mean()))}


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
