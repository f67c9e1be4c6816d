"""`Run`: one batch from its prompts to its completions."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from jaxinfer.cache.base import bytes_of
from jaxinfer.cache.policy import Cache, Policy
from jaxinfer.cache.presets import full
from jaxinfer.decode.capacity import ENDLESS_BUFFER, capacity_for, check_fits
from jaxinfer.decode.engine import SMALLEST_CAPACITY, bucket, repeat_rows, seen_tokens
from jaxinfer.decode.loop import plain_step
from jaxinfer.decode.model import Model, Prompt
from jaxinfer.decode.options import Options
from jaxinfer.decode.prefix import Prefix
from jaxinfer.decode.readout import Readout
from jaxinfer.decode.results import Completion, Stats
from jaxinfer.decode.rows import Rows
from jaxinfer.decode.sampling import Sampler
from jaxinfer.decode.state import DecodeState
from jaxinfer.models.stack import grow_cache
from jaxinfer.typing import Leaf

ENDLESS_KEPT = 4096  # its newest tokens and pieces of text, which its completion holds


class Run:
    """One batch from its prompts to its completions.

    Everything is checked before anything is compiled. A draft plans from `model`, `policy`,
    `engine`, `contexts` (the text of each row), `limits`, `samplers` and `endless`.

    Args:
      model: what generates.
      prompts: texts or token lists, one or more.
      opts: what is asked of them.
      consume: the prefix gives its cache away, and takes over what is in `state` at the end.

    Raises:
      ValueError: an option is wrong, or what is asked does not fit the model or the memory.
    """

    def __init__(
        self, model: Model, prompts: Sequence[Prompt], opts: Options, *, consume: bool = False
    ):
        self.model, self.opts, self.consume = model, opts, consume
        self.prompts, self.policy = _read_by(model, prompts, opts)
        self.prefix_tokens = [] if opts.prefix is None else opts.prefix.tokens
        self.capacity = self._checked_capacity()
        self.rows = Rows.of(model, self.prompts, opts)
        self.contexts = [self.prefix_tokens + prompt for prompt in self.rows.prompts]
        self.requests = self.rows.requests(model, opts.limit)
        self.engine = model.engine.serving(self.policy)
        self.plan = None if opts.draft is None else opts.draft.plan(self)
        # A session remembers all of its text; its tokens are read out as they come.
        kept = ENDLESS_KEPT if self.endless and not consume else None
        # The text of a session goes on: what one turn leaves of a character the next one sends.
        prefix = opts.prefix if consume else None
        owed = 0 if prefix is None or self.prompts[0] != prefix.pending else prefix.owed
        self.out = Readout(
            self.rows, model.tokenizer, kept, self.contexts, owed=owed, goes_on=consume
        )
        self.state: DecodeState | None = None
        self.steps, self.finished = 0, False
        self.step_tokens: tuple[int, ...] = ()
        self.times = {"prefill": 0.0, "decode": 0.0}
        self._compiled = self.engine.compile_s
        self._cache_bytes = 0

    @property
    def endless(self) -> bool:
        """Whether the text has no end of its own."""
        return self.rows.endless

    @property
    def limits(self) -> list[int]:
        """Most new tokens of each row."""
        return [one.max_new_tokens for one in self.rows.asked]

    @property
    def samplers(self) -> list[Sampler]:
        """The sampler of each row."""
        return [one.sampler for one in self.rows.asked]

    def finish(self) -> list[Completion]:
        """Runs to the end at once."""
        if self.endless:
            raise ValueError("max_new_tokens=None never ends; use stream, or give a number")
        for _ in self.pieces(self.rows.limit):
            pass
        return self.completions()

    def pieces(self, steps: int) -> Iterator[list[str]]:
        """Runs to the end, `steps` model steps at a time, yielding each row's new text.

        With stop strings one step at a time, so that little is made behind one.
        """
        steps = 1 if self.out.has_stop_strings else steps
        if self.endless and self.plan is not None:  # the buffer must hold what they emit
            steps = max(1, min(steps, ENDLESS_BUFFER // self.plan.most))
        step = plain_step if self.plan is None else self.plan.step
        state = self._begun()
        while True:
            self.finished = bool(np.asarray(state.done).all())
            yield self.new_text()
            if self.finished:
                return
            stopped = self.out.stopped
            if any(stopped):
                state = replace(state, done=state.done | jnp.asarray(stopped))
            with self._timed("decode"):
                # Kept before it is waited for: an interrupt of the wait must find it.
                self.state = state = self.engine.decode(self.requests, state, steps, step)
                state.done.block_until_ready()

    def new_text(self) -> list[str]:
        """Reads out what the state has that was not read before; each row's text of it."""
        state = self.state
        assert state is not None
        self.steps = int(state.steps)
        if self.plan is not None:
            self.step_tokens = self.plan.step_tokens(state)
        return self.out.update(state, finished=self.finished)

    def completions(self) -> list[Completion]:
        """One per row, in order, of what was read out so far."""
        stats, out = self._stats(), self.out
        return [
            Completion(
                text="" if stream is None else stream.text,
                tokens=list(out.tokens[row]),
                finish_reason=out.finish_reason(row, finished=self.finished),
                log_probs=list(out.log_probs[row]),
                stats=stats,
            )
            for row, stream in enumerate(out.streams)
        ]

    def _stats(self) -> Stats:
        total, rows = int((self.out.read - self.out.dropped).sum()), len(self.rows)
        decode_s, steps = self.times["decode"], self.steps * rows
        if self.step_tokens:
            steps = sum(self.step_tokens)
        return Stats(
            prompt_tokens=sum(map(len, self.rows.prompts)),
            new_tokens=total,
            prefill_s=self.times["prefill"],
            decode_s=decode_s,
            compile_s=self.model.engine.compile_s - self._compiled,
            tokens_per_s=(total - rows) / decode_s if total > rows and decode_s > 0 else 0.0,
            tokens_per_step=(total - rows) / steps if steps else 1.0,
            cache_bytes=self._cache_bytes,
            step_tokens=self.step_tokens,
            sparsity=None if self.model.sparsity is None else self.model.sparsity.name,
        )

    def _checked_capacity(self) -> int:
        """The cache's capacity, which fits into the memory beside the rows and their tokens."""
        asked = self.opts.per_prompt(len(self.prompts))
        new, rows = max(one.max_new_tokens for one in asked), len(asked) * self.opts.samples
        read, prefix = max(map(len, self.prompts)), self.opts.prefix
        context = len(self.prefix_tokens) + read
        capacity = capacity_for(self.model, self.policy, context, new)
        allocates = not (self.consume and prefix is not None and capacity <= prefix.capacity)
        check_fits(self.model, self.policy, rows, capacity, read, new=new, allocates=allocates)
        return capacity

    def _begun(self) -> DecodeState:
        """The state behind the prompts, with the first tokens drawn."""
        cache, logits = self._prefilled()
        seen = seen_tokens(self.requests, self.contexts, self.model.config.vocab_size)
        size = ENDLESS_BUFFER if self.endless else self.rows.limit
        with self._timed("decode"):
            self.state = state = self.engine.init_state(cache, logits, self.requests, seen, size)
            state.done.block_until_ready()
        if self.plan is not None:
            with self._timed("prefill"):
                self.state = state = self.plan.init_state(state)
            self.engine = self.plan.engine
        self._cache_bytes = bytes_of(state.cache.layers)
        return state

    def _prefilled(self) -> tuple[Cache, Leaf]:
        engine, prefix, samples = self.engine, self.opts.prefix, self.opts.samples
        prompts = self.prompts
        if prefix is None:
            lengths = list(map(len, prompts))
            cache = engine.new_cache(self.policy, len(prompts), self.capacity, contexts=lengths)
        elif self.consume:
            cache = grow_cache(self.model.config, prefix.take_cache(), self.capacity)
        else:
            cache = grow_cache(self.model.config, prefix.cache, self.capacity)
            cache = repeat_rows(cache, len(prompts))
        with self._timed("prefill"):
            cache, logits = engine.prefill(cache, None, prompts, empty=not self.prefix_tokens)
            if samples > 1:
                cache = repeat_rows(cache, samples)
                logits = jnp.repeat(logits, samples, axis=0)
            logits.block_until_ready()
        return cache, logits

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        """Adds the seconds of the block, compilation excluded, to `times[name]`."""
        start, compiled = time.perf_counter(), self.model.engine.compile_s
        yield
        seconds = time.perf_counter() - start - (self.model.engine.compile_s - compiled)
        self.times[name] += max(seconds, 0.0)


def _read_by(
    model: Model, prompts: Sequence[Prompt], opts: Options
) -> tuple[list[list[int]], Policy]:
    """The tokens to read for each prompt, and the policy that keeps them."""
    prefix = opts.prefix
    if prefix is None:
        tokens = [model.encode(prompt) for prompt in prompts]
        policy = full() if opts.policy is None else opts.policy
        return tokens, policy.sized(bucket(max(map(len, tokens)), SMALLEST_CAPACITY))
    if isinstance(prefix, Prefix) and prefix.model.config == model.config:
        prefix.check_sparsity(model.sparsity)
    if not isinstance(prefix, Prefix) or prefix.model is not model:
        raise ValueError(
            "prefix is not a session of this model; start one with lm.session() and append the "
            "common text to it"
        )
    if opts.policy is not None:
        asked = opts.policy.sized(model.config.max_positions)
        if asked != prefix.policy:
            raise ValueError(
                f"the session keeps its cache under policy {prefix.policy.name!r}, not under this "
                f"{asked.name!r}; leave policy out, or start a session with lm.session(policy)"
            )
    return [prefix.continued(prompt) for prompt in prompts], prefix.policy
