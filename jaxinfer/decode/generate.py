"""Generation for users: batches of unequal prompts, samples, stop strings, streaming,
statistics."""

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxinfer.cache.base import Cache, Policy, bytes_of
from jaxinfer.cache.presets import resolve
from jaxinfer.compile import memory
from jaxinfer.decode.engine import (
    CHUNK,
    SMALLEST_CAPACITY,
    WHOLE,
    bucket,
    grow,
    make_requests,
    repeat_rows,
    seen_tokens,
)
from jaxinfer.decode.sampling import Sampler
from jaxinfer.decode.state import DecodeState
from jaxinfer.decode.text import TextStream
from jaxinfer.models.stack import cache_geometry

STREAM_STEPS = 4  # model steps between two looks at the text; one host round trip each
ENDLESS = 2**31 - 1  # tokens of a stream without end
ENDLESS_BUFFER = 64  # its token buffer, which the loop fills in circles


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

    def __getitem__(self, name: str) -> Any:
        return asdict(self)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(asdict(self))

    def __len__(self) -> int:
        return len(asdict(self))


@dataclass(frozen=True, kw_only=True)
class Completion:
    """`finish_reason`: "eos" (a stop token, which is the last token), "stop" (a stop string; the
    text ends before it) or "length". `log_probs` are the model's own, before sampler settings."""

    text: str
    tokens: list[int]
    finish_reason: str
    log_probs: list[float]
    stats: Stats


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `LM.generate` and `LM.stream`.

    policy: cache policy (`ji.full()`, a name, a mapping, a list with one per layer). sampler,
    max_new_tokens, seed: one, or a list with one per prompt; a prompt's text depends on its own
    seed only. max_new_tokens=None streams without end, for policies of fixed memory. samples:
    completions per prompt, sample i of seed s draws from seed s + i. stop: strings that end the
    text. ignore_eos: go on to the limit. prefix: a `Session` whose tokens come before every prompt,
    read only once.
    draft, sparsity: methods of other modules.
    """

    policy: Any = None
    sampler: Sampler | Sequence[Sampler] = Sampler()
    max_new_tokens: int | None | Sequence[int] = 64
    seed: int | Sequence[int] = 0
    samples: int = 1
    stop: str | Sequence[str] = ()
    ignore_eos: bool = False
    prefix: Any = None
    draft: Any = None
    sparsity: Any = None
    limit: int | None = None  # emit fewer tokens than the buffers hold: warm-up

    def __post_init__(self):
        for name in ("draft", "sparsity"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not supported by this model object"
                )
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


def generate(lm: Any, prompts: Sequence[Any], **options: Any) -> list[Completion]:
    """See `LM.generate`."""
    opts = parse_options(options)
    if not prompts:
        return []
    if opts.max_new_tokens is None:
        raise ValueError("max_new_tokens=None never ends; use stream, or give a number")
    run = Run(lm, prompts, opts)
    for _ in run.pieces(max(run.limits)):
        pass
    return run.completions()


def stream(lm: Any, prompt: Any, **options: Any) -> Iterator[str]:
    """See `LM.stream`. Bad options are refused at the call, not at the first piece."""
    if lm.tokenizer is None:
        raise ValueError("streaming text needs a tokenizer; use generate with token lists")
    run = Run(lm, [prompt], parse_options(options))
    return (piece for pieces in run.pieces(STREAM_STEPS) for piece in pieces if piece)


class Run:
    """One batch from prompts to completions."""

    def __init__(self, lm: Any, prompts: Sequence[Any], opts: Options, *, consume: bool = False):
        self.lm, self.opts, self.consume = lm, opts, consume
        if opts.prefix is not None:
            prompts = [opts.prefix.pending + opts.prefix.encode(p) for p in prompts]
        else:
            prompts = [lm.encode(p) for p in prompts]
        self.prompts = prompts
        count = len(prompts)
        self.samplers = _each(opts.sampler, count, Sampler, "sampler")
        wanted = ENDLESS if opts.max_new_tokens is None else opts.max_new_tokens
        self.limits = _each(wanted, count, int, "max_new_tokens")
        seeds = _each(opts.seed, count, int, "seed")
        if min(self.limits) < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {min(self.limits)}")
        if any(opts.stop_strings) and lm.tokenizer is None:
            raise ValueError("stop strings need a tokenizer; give token lists without stop=")
        vocab = lm.config.vocab_size
        repeated = [i for i in range(count) for _ in range(opts.samples)]
        self.rows = [prompts[i] for i in repeated]
        self.limits = [self.limits[i] for i in repeated]
        limits = [min(n, opts.limit) for n in self.limits] if opts.limit else self.limits
        self.requests = make_requests(
            [self.samplers[i] for i in repeated],
            [seeds[i] + j % opts.samples for j, i in enumerate(repeated)],
            limits,
            # -1 matches no token; the width stays, so that both need one program
            [-1 if opts.ignore_eos else token for token in lm.config.eos_token_ids],
            vocab,
        )
        self.prefix_tokens = [] if opts.prefix is None else opts.prefix.tokens
        longest = len(self.prefix_tokens) + max(map(len, prompts))
        if opts.prefix is None:
            self.policy = resolve(opts.policy).sized(bucket(longest, SMALLEST_CAPACITY))
        else:
            self.policy = opts.prefix.policy
        self.engine = lm.engine.serving(self.policy)
        self.capacity = capacity_for(lm, self.policy, longest, max(self.limits))
        check_fits(lm, self.policy, len(self.rows), self.capacity, max(map(len, prompts)))
        self.tokens: list[list[int]] = [[] for _ in self.rows]
        self.log_probs: list[list[float]] = [[] for _ in self.rows]
        self.streams = [
            TextStream(lm.tokenizer, opts.stop_strings) if lm.tokenizer is not None else None
            for _ in self.rows
        ]
        self.state: DecodeState | None = None
        self.times = {"prefill": 0.0, "decode": 0.0}
        self._cache_bytes = 0

    def pieces(self, steps: int) -> Iterator[list[str]]:
        """Runs to the end, `steps` model steps at a time, yielding each row's new text.

        With stop strings one step at a time, so that no token behind a stop string is kept.
        """
        steps = 1 if any(self.opts.stop_strings) else steps
        engine = self.engine
        self._compiled = engine.compile_s
        cache, logits = self._prefilled()
        seen = seen_tokens(self.requests, self._contexts(), self.lm.config.vocab_size)
        with self._timed("decode"):
            most = max(self.limits)
            size = ENDLESS_BUFFER if most == ENDLESS else most
            state = engine.begin(cache, logits, self.requests, seen, size)
            state.done.block_until_ready()
        self._cache_bytes = bytes_of(state.cache.layers)
        while True:
            self.state = state
            finished = bool(np.asarray(state.done).all())
            yield self._new_text(state, last=finished)
            if finished:
                return
            stopped = [s is not None and s.stopped for s in self.streams]
            if any(stopped):
                state = replace(state, done=state.done | jnp.asarray(stopped))
            with self._timed("decode"):
                state = engine.decode(self.requests, state, steps)
                state.done.block_until_ready()

    def completions(self) -> list[Completion]:
        """One per row, in order."""
        state = self.state
        assert state is not None
        total, steps = sum(map(len, self.tokens)), int(state.steps)
        rows = len(self.rows)
        decode_s = self.times["decode"]
        stats = Stats(
            prompt_tokens=sum(map(len, self.rows)),
            new_tokens=total,
            prefill_s=self.times["prefill"],
            decode_s=decode_s,
            compile_s=self.lm.engine.compile_s - self._compiled,
            tokens_per_s=(total - rows) / decode_s if total > rows and decode_s > 0 else 0.0,
            tokens_per_step=(total - rows) / (steps * rows) if steps else 1.0,
            cache_bytes=self._cache_bytes,
        )
        stops = set(() if self.opts.ignore_eos else self.lm.config.eos_token_ids)
        out = []
        for ids, log_probs, stream in zip(self.tokens, self.log_probs, self.streams, strict=True):
            if stream is not None and stream.stopped:
                reason = "stop"
            else:
                reason = "eos" if ids and ids[-1] in stops else "length"
            out.append(
                Completion(
                    text="" if stream is None else stream.text,
                    tokens=ids,
                    finish_reason=reason,
                    log_probs=log_probs,
                    stats=stats,
                )
            )
        return out

    def _contexts(self) -> list[list[int]]:
        return [self.prefix_tokens + row for row in self.rows]

    def _prefilled(self) -> tuple[Cache, Any]:
        engine, prefix = self.engine, self.opts.prefix
        prompts = self.prompts
        if prefix is None:
            cache = engine.new_cache(self.policy, len(prompts), self.capacity)
        elif self.consume:
            cache = grow(prefix.take_cache(), self.capacity)
        else:
            cache = repeat_rows(grow(prefix.cache, self.capacity), len(prompts))
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

    def _new_text(self, state: DecodeState, last: bool) -> list[str]:
        tokens, log_probs, written = map(np.asarray, (state.tokens, state.log_probs, state.written))
        size = tokens.shape[1]
        pieces = []
        for row, stream in enumerate(self.streams):
            new = np.arange(len(self.tokens[row]), written[row]) % size
            ids = tokens[row, new].tolist()
            self.tokens[row] += ids
            self.log_probs[row] += log_probs[row, new].tolist()
            pieces.append("" if stream is None else stream.push(ids, last=last))
        return pieces


def capacity_for(lm: Any, policy: Policy, context: int, new: int) -> int:
    """The cache bucket for so many tokens; refuses what learned positions cannot reach, and an
    endless text in a cache that grows."""
    if new == ENDLESS and not (policy.unbounded and policy.positions == "in_cache"):
        raise ValueError(
            f"policy {policy.name!r} cannot go on for ever: its memory or its positions grow; "
            "choose streaming, or give max_new_tokens"
        )
    if policy.unbounded and policy.positions == "in_cache":
        reach = policy.sinks + (policy.window or 0) + 1
        if reach > lm.config.max_positions:
            warnings.warn(
                f"{policy.sinks} sinks + a window of {policy.window} exceed the "
                f"{lm.config.max_positions} positions that the model was trained on; take a "
                "smaller window",
                stacklevel=2,
            )
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
    return SMALLEST_CAPACITY if policy.unbounded else bucket(context + new, SMALLEST_CAPACITY)


def check_fits(lm: Any, policy: Policy, batch: int, capacity: int, tokens: int) -> None:
    """Refuses, before anything is compiled, what cannot fit in memory."""
    cfg = lm.config
    geometry = cache_geometry(cfg, capacity, lm.engine.dtype)
    layers = policy.layer_policies(cfg.num_layers)
    for one in dict.fromkeys(layers):
        one.check(cfg, geometry)
    per_row = sum(tier.bytes_per_row(geometry) for one in layers for tier in one.tiers)
    chunk = CHUNK if policy.chunk_invariant else WHOLE
    parts = memory.estimate(
        cfg,
        cache_bytes=batch * per_row,
        batch=batch,
        tokens=min(tokens, chunk),
        block=min(geometry.block or capacity, capacity),
    )
    memory.check_fits(parts)


def parse_options(options: dict[str, Any]) -> Options:
    known = Options.__dataclass_fields__
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"unknown generation options {unknown}; known are {sorted(known)}")
    return Options(**options)


def _each(value: Any, count: int, kind: type, name: str) -> list:
    if kind is int and isinstance(value, np.integer):
        value = int(value)
    if isinstance(value, kind):
        return [value] * count
    values = list(value)
    if len(values) != count:
        raise ValueError(
            f"{name} has {len(values)} entries for {count} prompts; give one or one each"
        )
    return values
