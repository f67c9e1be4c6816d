"""Requests that a plan is made for, or replayed with: rates, lengths, deadlines and traces."""

import csv
import dataclasses
import datetime
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jaxinfer.arguments import of_kind, real, shown, whole
from jaxinfer.fields import known_fields
from jaxinfer.files import one_line, read_text, write_text
from jaxinfer.typing import Json

MOST_REQUESTS = 10**6
MOST_TOKENS = 2**24  # of a prompt or an output
MOST_KINDS = 64
TRACE_LIMIT = 64 * 2**20  # bytes
COLUMNS = "TIMESTAMP", "ContextTokens", "GeneratedTokens"  # of the traces that Azure published


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Requests in the order of their arrival; the first may arrive later than at 0 s."""

    arrival_s: NDArray[np.float64]  # [B]
    prompt: NDArray[np.int64]  # [B] tokens
    output: NDArray[np.int64]  # [B] tokens, at least 1

    def __post_init__(self):
        for name in ("arrival_s", "prompt", "output"):
            of_kind(name, getattr(self, name), np.ndarray, "an array")
        sizes = {len(self.arrival_s), len(self.prompt), len(self.output)}
        if len(sizes) != 1:
            raise ValueError(f"a trace needs columns of one length, got lengths {sorted(sizes)}")
        whole("requests of a trace", len(self.arrival_s), 1, MOST_REQUESTS)
        times = self.arrival_s
        if not np.isfinite(times).all() or times[0] < 0 or (np.diff(times) < 0).any():
            raise ValueError("arrivals of a trace must be finite, at 0 s or later, and in order")
        for name in ("prompt", "output"):
            column = getattr(self, name)
            if column.min() < 1 or column.max() > MOST_TOKENS:
                raise ValueError(f"{name} lengths of a trace must be from 1 to {MOST_TOKENS}")

    def __len__(self) -> int:
        return len(self.arrival_s)

    def save(self, path: str | Path) -> None:
        """Writes the columns of Azure's traces, with the time in seconds."""
        out = io.StringIO()
        rows = csv.writer(out, lineterminator="\n")
        rows.writerow(COLUMNS)
        rows.writerows(zip(self.arrival_s.tolist(), self.prompt, self.output, strict=True))
        write_text(path, out.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> "Trace":
        """A CSV file with the columns TIMESTAMP, ContextTokens and GeneratedTokens.

        Times are seconds, or dates as Azure's traces write them; the first request arrives at 0 s.

        Raises:
            ValueError: it is too large, or a line of it is not such a request; names file and line.
        """
        path, times, lengths = Path(path), [], []
        rows = csv.reader(io.StringIO(read_text(path, TRACE_LIMIT)))
        name = one_line(path, 1000)
        try:
            header = next(rows, [])
            if tuple(header[:3]) != COLUMNS:
                raise ValueError(f"expected the columns {', '.join(COLUMNS)}, got {shown(header)}")
            for row in rows:
                if len(times) == MOST_REQUESTS:
                    raise ValueError(f"at most {MOST_REQUESTS} requests are read")
                if len(row) < 3:
                    raise ValueError(f"expected three columns, got {shown(row)}")
                times.append(_seconds(row[0]))
                lengths.append((_tokens(row[1]), max(_tokens(row[2]), 1)))
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{name}, line {rows.line_num}: {one_line(error)}") from error
        if not times:
            raise ValueError(f"{name} has no requests")
        if not np.isfinite(times).all():
            raise ValueError(f"{name} has times that are not finite")
        order = np.argsort(np.array(times), kind="stable")
        arrival = np.array(times)[order] - min(times)
        prompt, output = np.array(lengths)[order].T
        return cls(arrival_s=arrival, prompt=np.maximum(prompt, 1), output=output)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Poisson arrivals of requests of some kinds, each due `deadline_s` after it arrives.

    `lengths` are the kinds as (prompt tokens, output tokens, weight).
    """

    requests_per_s: float
    deadline_s: float
    lengths: tuple[tuple[int, int, float], ...] = ((512, 128, 1.0),)

    def __post_init__(self):
        real("requests_per_s", self.requests_per_s, 1e-9, 1e9)
        real("deadline_s", self.deadline_s, 1e-9, 1e9)
        whole("kinds of requests", len(self.lengths), 1, MOST_KINDS)
        for one in self.lengths:
            if not isinstance(one, tuple | list) or len(one) != 3:
                raise ValueError(f"lengths must be (prompt, output, weight), got {shown(one)}")
            whole("prompt tokens", one[0], 1, MOST_TOKENS)
            whole("output tokens", one[1], 1, MOST_TOKENS)
            real("the weight of a kind of requests", one[2], 1e-9, 1e9)

    @property
    def mean_prompt(self) -> float:
        """Tokens of a prompt, on average."""
        return float(np.average([one[0] for one in self.lengths], weights=self._shares))

    @property
    def mean_output(self) -> float:
        """Tokens of an output, on average."""
        return float(np.average([one[1] for one in self.lengths], weights=self._shares))

    @property
    def context(self) -> int:
        """Tokens of the longest request."""
        return max(one[0] + one[1] for one in self.lengths)

    @property
    def _shares(self) -> NDArray[np.float64]:
        weights = np.array([one[2] for one in self.lengths])
        return weights / weights.sum()

    def trace(self, requests: int, seed: int = 0) -> Trace:
        """So many requests; equal seeds give equal requests, and another rate only scales time."""
        requests = whole("requests", requests, 1, MOST_REQUESTS)
        random = np.random.default_rng(seed)
        arrival = random.exponential(1.0, requests).cumsum() / self.requests_per_s
        kinds = random.choice(len(self.lengths), requests, p=self._shares)
        found = np.array([one[:2] for one in self.lengths], np.int64)[kinds]
        return Trace(arrival_s=arrival, prompt=found[:, 0], output=found[:, 1])

    def to_dict(self) -> Json:
        """A JSON-ready dictionary; `Workload.from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Json) -> "Workload":
        """The workload that `to_dict` wrote; ValueError where it holds anything else."""
        found = known_fields(cls, data)
        lengths = found.get("lengths", ())
        if not isinstance(lengths, tuple):
            raise ValueError(f"lengths must be a list of kinds, got {shown(lengths)}")
        found["lengths"] = tuple(tuple(one) if isinstance(one, list) else one for one in lengths)
        return cls(**found)


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        pass
    try:
        found = datetime.datetime.fromisoformat(text.strip())
    except ValueError:
        raise ValueError(f"TIMESTAMP must be seconds or a date, got {shown(text)}") from None
    if found.tzinfo is None:
        found = found.replace(tzinfo=datetime.UTC)
    return found.timestamp()


def _tokens(text: str) -> int:
    try:
        return whole("a number of tokens", int(text), 0, MOST_TOKENS)
    except ValueError:
        raise ValueError(f"tokens must be from 0 to {MOST_TOKENS}, got {shown(text)}") from None
