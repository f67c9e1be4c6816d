"""Perplexity of one long token stream, as a curve (StreamingLLM, arXiv 2309.17453, section 4.1).

`stream_perplexity` reads the stream through one cache. A policy whose memory is fixed goes on for
2^31 tokens (positions are int32); one whose cache grows stops, and says so, at its limit.
`recompute_perplexity` is the quality oracle of sliding-window re-computation: the last L tokens are
read anew, without any cache, for every `stride` tokens. Tokens arrive as an iterator, so neither
the host nor the device holds more than a piece of them; `text_tokens` makes one of pieces of text.
"""

import itertools
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxinfer.cache.policy import Policy
from jaxinfer.cache.presets import resolve
from jaxinfer.config import ModelConfig
from jaxinfer.decode.loop import token_log_probs
from jaxinfer.eval.documents import regrouped
from jaxinfer.eval.reader import Reader
from jaxinfer.models.stack import forward
from jaxinfer.runtime.program import Program
from jaxinfer.typing import Params

Report = Callable[[int], None]
RECOMPUTED_AT_ONCE = 8  # windows per call
LONGEST = 2**31 - 2**16  # tokens; positions of the last, padded chunk must fit into an int32
BESIDE = 64  # characters on either side of a cut that must have the same tokens with and without it
CUT = re.compile(r"(?<=\S)(?= [^\W_])|(?<=\S\n)(?=[^\W_])")
CUTS_TRIED = 16  # per piece of text


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

    def metrics(self) -> dict[str, Any]:
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


def check_endless(policy: Policy) -> None:
    """Refuses a policy whose memory or positions grow with the text."""
    if policy.endless:
        return
    why = "it counts positions in the text" if policy.fixed_size else "its memory grows with it"
    raise ValueError(
        f"policy {policy.name!r} cannot read a stream of any length: {why}; choose streaming with "
        "positions='in_cache' (in every layer), or give a limit of tokens"
    )


def stream_perplexity(
    lm: Any,
    tokens: Iterable[np.ndarray],
    policy: Any = None,
    *,
    every: int = 2048,
    chunk: int | None = None,
    limit: int | None = None,
    report: Report = lambda tokens: None,
) -> Curve:
    """Reads arrays i32[T] of a stream through one cache; a point per `every` tokens.

    `limit` is the most tokens that a growing cache may hold (default: the model's positions); a
    policy of fixed memory needs none and stops there only if it is given. Past the model's
    positions a full cache is the "dense" baseline of the paper, `streaming(sinks=0)` is "window".
    """
    policy = resolve(policy)
    most = lm.config.max_positions
    end = limit if limit is not None else LONGEST if policy.endless else most
    end = min(end, most if lm.config.positions == "learned" else LONGEST)
    reader = Reader(lm, policy, most, chunk=chunk)
    averages, start, stopped, largest = _Averages(every), time.perf_counter(), "", 0
    for piece in regrouped(tokens, reader.chunk):
        left = end - averages.read
        try:
            found = reader.read(piece[None, :left]).log_probs[0] if left != 0 else None
        except ValueError as error:  # no room for a larger cache
            if not averages.read:
                raise
            stopped = f"after {averages.read} tokens: {error}"
            break
        if found is not None:
            averages.add(found, len(piece[:left]))
            largest = max(largest, reader.cache_bytes)
            report(averages.read)
        if left < len(piece):
            whose = "int32 positions" if end == LONGEST else f"policy {policy.name!r}"
            stopped = f"after {averages.read} tokens: the limit of {whose}"
            break
    return averages.curve(policy.name, largest, time.perf_counter() - start, reader.chunk, stopped)


def text_tokens(lm: Any, pieces: Iterable[str]) -> Iterator[np.ndarray]:
    """Yields i32[T], the tokens of a text that comes in pieces: exactly those of the whole text.

    Byte-level tokenizers split a text into words before all else. It is cut where they all do,
    before a space or behind a line break that stands between a visible character and a letter or
    digit, and only where the tokens beside the cut prove to be those without it. Of a text and
    tokenizer without such places everything is held until the end, else two pieces at most.
    """
    held: list[str] = []
    is_first = True

    def tokens(text: str) -> np.ndarray:
        return np.asarray(lm.encode(text, continues=not is_first), np.int32)

    for piece in pieces:
        cut = _cut(lm, piece)
        if cut is None:
            held.append(piece)
            continue
        yield tokens("".join(held) + piece[:cut])
        held, is_first = [piece[cut:]], False
    yield tokens("".join(held))


def _cut(lm: Any, text: str) -> int | None:
    """Where `text` may be cut, as far behind as possible; None if nowhere."""
    places = [found.start() for found in CUT.finditer(text, BESIDE, max(len(text) - BESIDE, 0))]
    for place in reversed(places[-CUTS_TRIED:]):
        before, after = text[place - BESIDE : place], text[place : place + BESIDE]
        apart = lm.encode(before) + lm.encode(after, continues=True)
        if apart == lm.encode(before + after):
            return place
    return None


def recompute_perplexity(
    lm: Any,
    tokens: Iterable[np.ndarray],
    *,
    window: int,
    stride: int = 1,
    every: int = 2048,
    report: Report = lambda tokens: None,
) -> Curve:
    """Re-computation over a sliding window of `window` tokens that moves by `stride`.

    A token sees between `window - stride` and `window - 1` tokens before it; stride 1 is the oracle
    itself and costs a forward of `window` tokens for each. Its cache bytes are 0: it has none.
    """
    if not 1 <= stride < window:
        raise ValueError(f"stride must be from 1 to window - 1 = {window - 1}, got {stride}")
    if window > lm.config.max_positions:
        raise ValueError(
            f"window {window} exceeds the model's {lm.config.max_positions} positions; shorten it"
        )
    program = lm.engine.programs.setdefault(
        "recompute", Program(_recompute, static_argnames=("cfg", "last"), name="recompute")
    )
    averages, start = _Averages(every), time.perf_counter()
    alike = itertools.groupby(_windows(tokens, window, stride), key=lambda w: (w[0].size, w[1]))
    for (size, last), group in alike:
        while rows := list(itertools.islice(group, RECOMPUTED_AT_ONCE)):
            padded = np.zeros((RECOMPUTED_AT_ONCE, size), np.int32)
            padded[: len(rows)] = [row for row, _ in rows]
            found = program(lm.config, lm.params, jnp.asarray(padded), last=last)
            first = 1 if averages.read == 0 else 0  # the stream's first token is not scored
            averages.add(np.asarray(found)[: len(rows)].ravel(), len(rows) * last + first)
            report(averages.read)
    name = f"recompute window={window} stride={stride}"
    return averages.curve(name, 0, time.perf_counter() - start, window, "")


def _recompute(
    cfg: ModelConfig, params: Params, tokens: Int[Array, "B T"], last: int
) -> Float[Array, "B A"]:
    """log p of the `last` tokens of every row, read without a cache."""
    hidden = forward(cfg, params, tokens, logits="none").hidden
    return token_log_probs(cfg, params, hidden[:, -last - 1 : -1], tokens[:, -last:])[0]


def _windows(
    tokens: Iterable[np.ndarray], window: int, stride: int
) -> Iterator[tuple[np.ndarray, int]]:
    """Yields (at most `window` tokens, how many of the last ones are to be scored): a first window
    with all of its tokens, then one per `stride`."""
    held, is_first = np.zeros((0,), np.int32), True
    for piece in regrouped(tokens, stride):
        if is_first and len(held) + len(piece) > window:
            yield held, len(held) - 1
            is_first = False
        held = np.concatenate([held, piece])[-window:]
        if not is_first:
            yield held, len(piece)
    if is_first and len(held) > 1:
        yield held, len(held) - 1


class _Averages:
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
