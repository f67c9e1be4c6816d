"""Reading known text through a cache: each token's probability, and whether it was the likeliest.

`Reader` owns a live cache of B rows and reads their next tokens into it, chunk by chunk, so that
the device never holds more than one chunk beside the cache. `peek` reads without writing, which is
how continuations of a session are compared. Adds no shape letters.
"""

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxinfer.cache.base import bytes_of
from jaxinfer.cache.context import chain_context
from jaxinfer.cache.policy import Cache, Policy
from jaxinfer.config import ModelConfig
from jaxinfer.decode.engine import CHUNK, SMALLEST_CAPACITY, Engine, bucket, padded
from jaxinfer.decode.generate import check_fits
from jaxinfer.decode.loop import token_log_probs
from jaxinfer.models.stack import commit, forward, grow_cache
from jaxinfer.runtime.program import Program
from jaxinfer.typing import Params

SMALLEST_PIECE = 8  # tokens that a piece is padded to; fewer shapes mean fewer compilations


class Reading(NamedTuple):
    """log p of each token given all before it (nats), and whether it was the likeliest one."""

    log_probs: np.ndarray  # f32[B, T]
    best: np.ndarray  # bool[B, T]


def _read(
    cfg: ModelConfig,
    params: Params,
    cache: Cache,
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    count: Int[Array, " B"],
    keeps: bool,
) -> tuple[Cache | None, Array, Array]:
    """Judges targets[i] after the cache and tokens[: i + 1]; with `keeps`, also the cache behind
    them."""
    ctx = chain_context(cache.length, count, tokens.shape[1])
    out = forward(cfg, params, tokens, cache, ctx, logits="none")
    log_probs, best = token_log_probs(cfg, params, out.hidden, targets)
    after = commit(cfg, params, cache, out.fresh, None, count, log_probs) if keeps else None
    return after, log_probs, best


def _programs(engine: Engine) -> dict[str, Program]:
    """The model's programs, with those of reading among them."""
    programs = engine.programs
    if "read" not in programs:
        static = ("cfg", "keeps")
        programs["read"] = Program(
            _read, static_argnames=static, donate_argnames=("cache",), name="read"
        )
        programs["peek"] = Program(_read, static_argnames=static, name="peek")
    return programs


def _run(engine: Engine, cache: Cache, tokens: np.ndarray, targets: np.ndarray, *, keeps: bool):
    count = tokens.shape[1]
    size = bucket(count, min(SMALLEST_PIECE, count))
    program = _programs(engine)["read" if keeps else "peek"]
    cache, log_probs, best = program(
        engine.config,
        engine.params,
        cache,
        padded(tokens.tolist(), size),
        padded(targets.tolist(), size),
        jnp.full((len(tokens),), count, jnp.int32),
        keeps=keeps,
    )
    return cache, Reading(np.asarray(log_probs)[:, :count], np.asarray(best)[:, :count])


def peek(engine: Engine, cache: Cache, last: int, tokens: list[int]) -> Reading:
    """How likely `tokens` are after a cache of one row and the token `last`; nothing is written."""
    both = np.asarray([[last, *tokens]], np.int32)
    return _run(engine, cache, both[:, :-1], both[:, 1:], keeps=False)[1]


class Reader:
    """B rows read side by side through one policy's cache.

    `context` is the length that shares of a budget refer to. The cache starts small and doubles
    where the policy keeps every token; the text's last token waits outside it.

    Example:
        reader = Reader(lm, ji.streaming(4, 252), context=256)
        reader.read([[1, 2, 3]]).log_probs     # f32[1, 2]: the first token of all has none
        reader.read([[4, 5]]).log_probs        # f32[1, 2]
    """

    def __init__(
        self, lm: Any, policy: Policy, context: int, *, rows: int = 1, chunk: int | None = None
    ):
        self.lm = lm
        self.policy = policy.sized(bucket(context, 1))
        self.policy.warn_beyond(lm.config.max_positions)
        self.chunk = (CHUNK if self.policy.prompt == "chunks" else 1) if chunk is None else chunk
        if self.chunk < 1:
            raise ValueError(f"chunk must be at least 1 token, got {chunk}")
        self.engine = lm.engine.serving(self.policy)
        self.rows, self.length, self.capacity = rows, 0, SMALLEST_CAPACITY
        check_fits(lm, self.policy, rows, self.capacity, self.chunk)
        self.cache = self.engine.new_cache(self.policy, rows, self.capacity)
        self._last: np.ndarray | None = None  # i32[B, 1]

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache of all rows, as allocated now."""
        return bytes_of(self.cache.layers)

    def read(self, tokens: Any) -> Reading:
        """Reads i32[B, T], T tokens of every row; the first token of a row is not judged."""
        tokens = np.asarray(tokens, np.int32)
        if tokens.ndim != 2 or len(tokens) != self.rows:
            raise ValueError(
                f"expected {self.rows} rows of equally many tokens, got {tokens.shape}"
            )
        if self._last is not None:
            tokens = np.concatenate([self._last, tokens], axis=1)
        self._last = tokens[:, -1:]
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        self._reserve(self.length + inputs.shape[1])
        found = [self._chunk(inputs, targets, i) for i in range(0, inputs.shape[1], self.chunk)]
        if not found:
            return Reading(np.zeros((self.rows, 0), np.float32), np.zeros((self.rows, 0), bool))
        return Reading(*map(partial(np.concatenate, axis=1), zip(*found, strict=True)))

    def _chunk(self, inputs: np.ndarray, targets: np.ndarray, first: int) -> Reading:
        piece = slice(first, first + self.chunk)
        self.cache, reading = _run(
            self.engine, self.cache, inputs[:, piece], targets[:, piece], keeps=True
        )
        self.length += inputs[:, piece].shape[1]
        return reading

    def _reserve(self, length: int) -> None:
        stays = self.policy.fixed_size or length <= self.capacity
        capacity = self.capacity if stays else bucket(length, SMALLEST_CAPACITY)
        self.policy.check_room(capacity, 0, length)
        if stays:
            return
        check_fits(self.lm, self.policy, self.rows, capacity, self.chunk)
        self.cache, self.capacity = grow_cache(self.lm.config, self.cache, capacity), capacity
