"""Generation for users: batches of unequal prompts, samples, stop strings, streaming,
statistics."""

import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxinfer.cache.base import bytes_of
from jaxinfer.cache.policy import Cache, Policy
from jaxinfer.cache.presets import resolve
from jaxinfer.decode.engine import (
    SMALLEST_CAPACITY,
    bucket,
    make_requests,
    prefill_chunk,
    repeat_rows,
    seen_tokens,
)
from jaxinfer.decode.loop import plain_step
from jaxinfer.decode.options import ENDLESS, Options, parse_options
from jaxinfer.decode.state import DecodeState
from jaxinfer.decode.text import TextStream, special_tokens
from jaxinfer.models.stack import cache_bytes_per_row, cache_geometry, check_cache, grow_cache
from jaxinfer.runtime import memory

STREAM_STEPS = 4  # model steps between two looks at the text; one host round trip each
ENDLESS_BUFFER = 64  # token buffer of an endless stream, which the loop fills in circles
ENDLESS_KEPT = 4096  # its newest tokens and pieces of text, which its completion holds


@dataclass(frozen=True, kw_only=True)
class Stats(Mapping):
    """What a batch cost; seconds exclude compilation. Reads as a mapping too."""

    prompt_tokens: int
    new_tokens: int
    prefill_s: float
    decode_s: float
    compile_s: float
    tokens_per_s: float
    tokens_per_step: float
    cache_bytes: int
    step_tokens: tuple[int, ...] = ()  # speculative steps of a row by tokens emitted: 0, 1, 2, ...

    def __getitem__(self, name: str) -> Any:
        return asdict(self)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(asdict(self))

    def __len__(self) -> int:
        return len(asdict(self))


@dataclass(frozen=True, kw_only=True)
class Completion:
    """`finish_reason`: "eos" (a stop token of the model, which is the last token), "stop" (a stop
    string; the text ends before it), "length", or "cancelled" (a stream before its end).
    `log_probs` are the model's own, before sampler settings. Of an endless stream this is the
    newest part, `ENDLESS_KEPT` tokens."""

    text: str
    tokens: list[int]
    finish_reason: str
    log_probs: list[float]
    stats: Stats


def generate(lm: Any, prompts: Sequence[Any], **options: Any) -> list[Completion]:
    """See `LM.generate`."""
    opts = parse_options(options)
    return Run(lm, prompts, opts).finish() if prompts else []


def stream(lm: Any, prompt: Any, **options: Any) -> "Stream":
    """See `LM.stream`. Bad options are refused at the call, not at the first piece."""
    opts = parse_options(options)
    if opts.samples != 1:
        raise ValueError(f"a stream is one text, got samples={opts.samples}; use generate")
    return Stream(Run(lm, [prompt], opts))


class Stream(Iterator[str]):
    """The text of one continuation, piece by piece as it is made.

    `close` cancels it, as does dropping it. `at_end` is called when it ends, in whatever way.
    """

    def __init__(self, run: "Run", at_end: Callable[["Run"], None] = lambda run: None):
        if run.lm.tokenizer is None:
            raise ValueError("streaming text needs a tokenizer; use generate with token lists")
        self._run = run
        self._pieces = _pieces(run, at_end)

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Ends the stream; what was made so far is in `completion`."""
        self._pieces.close()

    @property
    def completion(self) -> Completion:
        """What was made so far."""
        return self._run.completions()[0]


def _pieces(run: "Run", at_end: Callable[["Run"], None]) -> Generator[str]:
    try:
        for (piece,) in run.pieces(STREAM_STEPS):
            if piece:
                yield piece
    finally:
        at_end(run)
        run.state = None  # frees the cache


class Run:
    """One batch from prompts to completions.

    With `consume` the prefix gives its cache away, and takes over what is in `state` at the end.
    """

    def __init__(self, lm: Any, prompts: Sequence[Any], opts: Options, *, consume: bool = False):
        self.lm, self.opts, self.consume = lm, opts, consume
        prefix, cfg = opts.prefix, lm.config
        if prefix is None:
            self.prompts, self.prefix_tokens = [lm.encode(p) for p in prompts], []
            longest = max(map(len, self.prompts))
            self.policy = resolve(opts.policy).sized(bucket(longest, SMALLEST_CAPACITY))
        else:
            _check_prefix(lm, opts)
            self.prompts = [prefix.continued(p) for p in prompts]
            self.prefix_tokens, self.policy = prefix.tokens, prefix.policy
        self.rows = [prompt for prompt in self.prompts for _ in range(opts.samples)]
        asked = [one for one in opts.per_prompt(len(prompts)) for _ in range(opts.samples)]
        if any(any(one.stop) for one in asked) and lm.tokenizer is None:
            raise ValueError("stop strings need a tokenizer; give token lists without stop=")
        special = special_tokens(lm.tokenizer, {s for one in asked for s in one.stop})
        strings = [[s for s in one.stop if s and s not in special] for one in asked]
        self.stop_tokens = [[special[s] for s in one.stop if s in special] for one in asked]
        self.eos_tokens = [() if one.ignore_eos else cfg.eos_token_ids for one in asked]
        self.limits = [one.max_new_tokens for one in asked]
        self.samplers = [one.sampler for one in asked]
        self.requests = make_requests(
            self.samplers,
            [one.seed for one in asked],
            [min(n, opts.limit) for n in self.limits] if opts.limit else self.limits,
            # -1 matches no token; the width stays, so that both need one program
            [
                [*stops, *(eos or [-1] * len(cfg.eos_token_ids))]
                for stops, eos in zip(self.stop_tokens, self.eos_tokens, strict=True)
            ],
            cfg.vocab_size,
            [i % opts.samples for i in range(len(asked))],
        )
        read = max(map(len, self.prompts))
        self.engine = lm.engine.serving(self.policy)
        most = max(self.limits)
        self.capacity = capacity_for(lm, self.policy, len(self.prefix_tokens) + read, most)
        allocates = not consume or self.capacity > opts.prefix.capacity
        check_fits(lm, self.policy, len(self.rows), self.capacity, read, allocates=allocates)

        self.endless = most == ENDLESS
        self.contexts = [self.prefix_tokens + row for row in self.rows]
        self.ahead = None if opts.draft is None else lm.ahead(opts.draft, self)
        self.step = plain_step if self.ahead is None else self.ahead.step
        # A session remembers all of its text; its tokens are read out as they come.
        kept = ENDLESS_KEPT if self.endless and not consume else None
        self.tokens: list[deque[int]] = [deque(maxlen=kept) for _ in self.rows]
        self.log_probs: list[deque[float]] = [deque(maxlen=kept) for _ in self.rows]
        self.streams = [
            None if lm.tokenizer is None else TextStream(lm.tokenizer, stop, kept)
            for stop in strings
        ]
        self.has_stop_strings = any(strings)
        self.state: DecodeState | None = None
        self.read_out = np.zeros(len(self.rows), np.int64)  # tokens of each row that were
        self.dropped = np.zeros(len(self.rows), np.int64)  # of these, behind a stop string
        self.steps, self.finished = 0, False
        self.step_tokens: tuple[int, ...] = ()
        self.times = {"prefill": 0.0, "decode": 0.0}
        self._compiled = self.engine.compile_s
        self._cache_bytes = 0

    def finish(self) -> list[Completion]:
        """Runs to the end at once."""
        if self.endless:
            raise ValueError("max_new_tokens=None never ends; use stream, or give a number")
        for _ in self.pieces(max(self.limits)):
            pass
        return self.completions()

    def pieces(self, steps: int) -> Iterator[list[str]]:
        """Runs to the end, `steps` model steps at a time, yielding each row's new text.

        With stop strings one step at a time, so that little is made behind one.
        """
        steps = 1 if self.has_stop_strings else steps
        if self.endless and self.ahead is not None:  # the buffer must hold what they emit
            steps = max(1, min(steps, ENDLESS_BUFFER // self.ahead.most))
        cache, logits = self._prefilled()
        seen = seen_tokens(self.requests, self.contexts, self.lm.config.vocab_size)
        size = ENDLESS_BUFFER if self.endless else max(self.limits)
        with self._timed("decode"):
            self.state = state = self.engine.init_state(cache, logits, self.requests, seen, size)
            state.done.block_until_ready()
        if self.ahead is not None:
            with self._timed("prefill"):
                self.state = state = self.ahead.init_state(state)
            self.engine = self.ahead.engine
        self._cache_bytes = bytes_of(state.cache.layers)
        while True:
            self.finished = bool(np.asarray(state.done).all())
            yield self.new_text()
            if self.finished:
                return
            stopped = [s is not None and s.stopped for s in self.streams]
            if any(stopped):
                state = replace(state, done=state.done | jnp.asarray(stopped))
            with self._timed("decode"):
                # Kept before it is waited for: an interrupt of the wait must find it.
                self.state = state = self.engine.decode(self.requests, state, steps, self.step)
                state.done.block_until_ready()

    def new_text(self) -> list[str]:
        """Reads out what the state has that was not read before; each row's text of it."""
        state = self.state
        assert state is not None
        tokens, log_probs, written = map(np.asarray, (state.tokens, state.log_probs, state.written))
        self.steps = int(state.steps)
        if self.ahead is not None:
            self.step_tokens = self.ahead.step_tokens(state)
        pieces = []
        for row, stream in enumerate(self.streams):
            new = np.arange(self.read_out[row], written[row]) % tokens.shape[1]
            ids = tokens[row, new].tolist()
            piece, kept = self._pushed(stream, ids)
            self.tokens[row] += ids[:kept]
            self.log_probs[row] += log_probs[row, new].tolist()[:kept]
            self.read_out[row] = written[row]
            self.dropped[row] += len(ids) - kept
            pieces.append(piece)
        return pieces

    def _pushed(self, stream: TextStream | None, ids: list[int]) -> tuple[str, int]:
        """The text that `ids` add, and how many of them there are up to a stop string's end."""
        if stream is None:
            return "", len(ids)
        if not self.has_stop_strings:
            return stream.push(ids, last=self.finished), len(ids)
        piece = ""
        for number, token in enumerate(ids):
            if stream.stopped:
                return piece, number
            piece += stream.push([token], last=self.finished and number == len(ids) - 1)
        return piece + (stream.push([], last=True) if self.finished and not ids else ""), len(ids)

    def completions(self) -> list[Completion]:
        """One per row, in order, of what was read out so far."""
        total, rows = int((self.read_out - self.dropped).sum()), len(self.rows)
        decode_s, steps = self.times["decode"], self.steps * rows
        if self.step_tokens:
            steps = sum(self.step_tokens)
        stats = Stats(
            prompt_tokens=sum(map(len, self.rows)),
            new_tokens=total,
            prefill_s=self.times["prefill"],
            decode_s=decode_s,
            compile_s=self.lm.engine.compile_s - self._compiled,
            tokens_per_s=(total - rows) / decode_s if total > rows and decode_s > 0 else 0.0,
            tokens_per_step=(total - rows) / steps if steps else 1.0,
            cache_bytes=self._cache_bytes,
            step_tokens=self.step_tokens,
        )
        return [
            Completion(
                text="" if stream is None else stream.text,
                tokens=list(self.tokens[row]),
                finish_reason=self._finish_reason(row),
                log_probs=list(self.log_probs[row]),
                stats=stats,
            )
            for row, stream in enumerate(self.streams)
        ]

    def _finish_reason(self, row: int) -> str:
        stream, ids = self.streams[row], self.tokens[row]
        last = ids[-1] if ids else None
        if (stream is not None and stream.stopped) or last in self.stop_tokens[row]:
            return "stop"
        if last in self.eos_tokens[row]:
            return "eos"
        return "length" if self.finished else "cancelled"

    def _prefilled(self) -> tuple[Cache, Any]:
        engine, prefix = self.engine, self.opts.prefix
        prompts = self.prompts
        if prefix is None:
            cache = engine.new_cache(self.policy, len(prompts), self.capacity)
        elif self.consume:
            cache = grow_cache(self.lm.config, prefix.take_cache(), self.capacity)
        else:
            cache = grow_cache(self.lm.config, prefix.cache, self.capacity)
            cache = repeat_rows(cache, len(prompts))
        with self._timed("prefill"):
            cache, logits = engine.prefill(cache, None, prompts, empty=not self.prefix_tokens)
            if self.opts.samples > 1:
                cache = repeat_rows(cache, self.opts.samples)
                logits = jnp.repeat(logits, self.opts.samples, axis=0)
            logits.block_until_ready()
        return cache, logits

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        """Adds the seconds of the block, compilation excluded, to `times[name]`."""
        start, compiled = time.perf_counter(), self.lm.engine.compile_s
        yield
        seconds = time.perf_counter() - start - (self.lm.engine.compile_s - compiled)
        self.times[name] += max(seconds, 0.0)


def _check_prefix(lm: Any, opts: Options) -> None:
    prefix = opts.prefix
    if getattr(prefix, "lm", None) is not lm:
        raise ValueError(
            "prefix is not a session of this model; start one with lm.session() and append the "
            "common text to it"
        )
    if opts.policy is not None:
        asked = resolve(opts.policy).sized(lm.config.max_positions)
        if asked != prefix.policy:
            raise ValueError(
                f"the session keeps its cache under policy {prefix.policy.name!r}, not under this "
                f"{asked.name!r}; leave policy out, or start a session with lm.session(policy)"
            )


def capacity_for(lm: Any, policy: Policy, context: int, new: int) -> int:
    """The cache bucket for so many tokens; refuses what learned positions cannot reach, and an
    endless text in a cache that grows."""
    if new == ENDLESS and not policy.endless:
        raise ValueError(
            f"policy {policy.name!r} cannot go on for ever: its memory or its positions grow; "
            "choose streaming, or give max_new_tokens"
        )
    if policy.endless:
        policy.warn_beyond(lm.config.max_positions)
        return SMALLEST_CAPACITY
    most = lm.config.max_positions
    if context + new > most:
        message = (
            f"{context} context + {new} new tokens exceed the model's {most} positions; "
            "shorten the prompt or lower max_new_tokens"
        )
        if lm.config.positions == "learned":
            raise ValueError(message)
        warnings.warn(message, stacklevel=2)
    grows = not policy.fixed_size
    capacity = bucket(context + new, SMALLEST_CAPACITY) if grows else SMALLEST_CAPACITY
    policy.check_room(capacity, context, new)
    return capacity


def check_fits(
    lm: Any, policy: Policy, batch: int, capacity: int, tokens: int, *, allocates: bool = True
) -> None:
    """Refuses, before anything is compiled, what cannot fit in memory.

    `allocates=False`: the cache is there already.
    """
    cfg = lm.config
    geometry = cache_geometry(cfg, capacity, lm.engine.dtype, lm.engine.backend)
    layers = policy.layer_policies(cfg.num_layers)
    check_cache(cfg, policy, geometry)
    chunk = prefill_chunk(layers)
    parts = memory.estimate(
        cfg,
        cache_bytes=batch * cache_bytes_per_row(cfg, policy, geometry) * allocates,
        batch=batch,
        tokens=min(tokens, chunk),
        block=min(geometry.backend.block or capacity, capacity),
    )
    memory.check_fits(parts)
