"""Reading known text through a cache: each token's probability, and whether it was the likeliest.

`read` goes chunk by chunk, so that the device never holds more than one chunk beside the cache;
`peek` reads without writing. `score` is what `LM.score` does for one text.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxinfer.arguments import whole
from jaxinfer.cache.base import bytes_of
from jaxinfer.cache.policy import Cache, Policy
from jaxinfer.decode.capacity import capacity_for, check_fits, check_room
from jaxinfer.decode.engine import CHUNK, Engine, bucket, padded
from jaxinfer.decode.model import Model


@dataclass(frozen=True)
class Score:
    """Log-probabilities (nats) of a text's tokens given those before; the first has none."""

    tokens: list[int]
    log_probs: list[float]
    cache_bytes: int
    chunk: int

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood per scored token, nats."""
        return -sum(self.log_probs) / max(len(self.log_probs), 1)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nll, 700.0))


class Reading(NamedTuple):
    """log p of each token given all before it (nats), and whether it was the likeliest one."""

    log_probs: np.ndarray  # f32[B, T]
    best: np.ndarray  # bool[B, T]


def chunk_of(policy: Policy, chunk: int | None = None) -> int:
    """How many tokens are read at once: `chunk`, or what suits the policy.

    Each chunk attends to what the policy has kept of the chunks before, so a policy that reads
    prompts whole reads one token at a time here, as it decodes.
    """
    if chunk is None:
        return CHUNK if policy.prompt == "chunks" else 1
    return whole("chunk", chunk)


def read(
    engine: Engine,
    cache: Cache,
    tokens: np.ndarray,
    chunk: int,
    size: int | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Cache, Reading]:
    """Reads i32[B, T + 1], the first T tokens of every row into the cache (donated), and judges the
    T tokens behind the first; `size` is what chunks are padded to (None: a power of two), and
    `report(done, total)` counts tokens of a row."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    found = []
    for first in range(0, inputs.shape[1], chunk):
        part = slice(first, first + chunk)
        after, reading = _run(engine, cache, inputs[:, part], targets[:, part], size, keeps=True)
        assert after is not None
        cache = after
        found.append(reading)
        report(min(first + chunk, inputs.shape[1]), inputs.shape[1])
    if not found:
        empty = (len(tokens), 0)
        return cache, Reading(np.zeros(empty, np.float32), np.zeros(empty, bool))
    return cache, Reading(*map(partial(np.concatenate, axis=1), zip(*found, strict=True)))


def peek(engine: Engine, cache: Cache, last: int, tokens: list[int]) -> Reading:
    """How likely `tokens` are after a cache of one row and the token `last`; nothing is written."""
    both = np.asarray([[last, *tokens]], np.int32)
    return _run(engine, cache, both[:, :-1], both[:, 1:], None, keeps=False)[1]


def score(
    model: Model,
    tokens: list[int],
    policy: Policy,
    chunk: int | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Score:
    """Log-probabilities through the cache: context committed, continuation read; `report(done,
    total)` counts tokens."""
    if len(tokens) < 2:
        raise ValueError(f"scoring needs at least 2 tokens, got {len(tokens)}")
    length = bucket(len(tokens), 1)
    chunk = min(chunk_of(policy, chunk), length)
    policy = policy.sized(length)
    engine = model.engine.serving(policy)
    capacity = capacity_for(model, policy, len(tokens), 0)
    check_room(model, policy, capacity, 0, len(tokens))
    check_fits(model, policy, 1, capacity, chunk)
    cache = engine.new_cache(policy, 1, capacity, contexts=[len(tokens)])
    cache_bytes = bytes_of(cache.layers)
    # One size for all chunks, the last one too: one program scores a text.
    _, found = read(engine, cache, np.asarray([tokens], np.int32), chunk, chunk, report)
    return Score(tokens, found.log_probs[0].tolist(), cache_bytes, chunk)


def _run(
    engine: Engine,
    cache: Cache,
    tokens: np.ndarray,
    targets: np.ndarray,
    size: int | None,
    *,
    keeps: bool,
) -> tuple[Cache | None, Reading]:
    count = tokens.shape[1]
    size = bucket(count, 1) if size is None else size
    after, log_probs, best = engine.programs["read" if keeps else "peek"](
        engine.config,
        engine.params,
        cache,
        padded(tokens.tolist(), size),
        padded(targets.tolist(), size),
        jnp.full((len(tokens),), count, jnp.int32),
        keeps=keeps,
    )
    return after, Reading(np.asarray(log_probs)[:, :count], np.asarray(best)[:, :count])
