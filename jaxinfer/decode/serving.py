"""`Serving`: what all requests of a batcher share, checked before anything is compiled."""

from collections.abc import Callable

import jax.numpy as jnp

from jaxinfer.arguments import whole
from jaxinfer.cache.base import bytes_of
from jaxinfer.cache.policy import Cache, Policy
from jaxinfer.decode.capacity import (
    ENDLESS_BUFFER,
    LONGEST,
    capacity_for,
    check_room,
    is_endless,
)
from jaxinfer.decode.engine import SMALLEST_CAPACITY, bucket
from jaxinfer.decode.loop import plain_step
from jaxinfer.decode.model import Model
from jaxinfer.decode.prefix_cache import PrefixCache
from jaxinfer.decode.prompt_reader import PromptReader, piece_size
from jaxinfer.decode.request import Request
from jaxinfer.decode.sampling import GREEDY
from jaxinfer.decode.slot_batch import SlotBatch
from jaxinfer.decode.slots import Row, slot_programs
from jaxinfer.decode.speculation import Draft
from jaxinfer.decode.stream import STREAM_STEPS
from jaxinfer.models.fingerprint import identity
from jaxinfer.models.stack import (
    cache_bytes_per_row,
    cache_geometry,
    can_truncate,
    check_cache,
)
from jaxinfer.runtime import memory

MOST_SLOTS = 1024


class Serving:
    """A model behind slots of one size.

    It is what a draft plans for (`jaxinfer.decode.speculation.Planned`): full slots, of which each
    has a token to go.

    Args:
      model: what generates.
      policy: how caches keep tokens.
      draft: what guesses ahead, in every row its own tree; None decodes token by token.
      slots: rows at once, a power of two.
      context: tokens of a row, prompt and answer together; of no more than the model's positions,
        unless the policy is endless.
      chunk: tokens of a prompt that are read between two rounds of decoding.
      prefix_bytes: of what stays in memory of texts that were read, for prompts that begin alike.

    Raises:
      ValueError: a number is out of range, the model cannot have the policy, or the slots do not
        fit into the memory.
    """

    def __init__(
        self,
        model: Model,
        policy: Policy,
        draft: Draft | None = None,
        *,
        slots: int,
        context: int,
        chunk: int,
        prefix_bytes: int = 0,
    ):
        self.slots = whole("slots", slots, most=MOST_SLOTS)
        if self.slots & (self.slots - 1):
            raise ValueError(f"slots must be a power of two, got {slots}")
        self.context = whole("context", context, least=2, most=LONGEST)
        if not is_endless(model, policy):
            self.context = min(self.context, model.config.max_positions)
        self.chunk = bucket(whole("chunk", chunk, most=LONGEST), 1)
        self.model, self.policy = model, policy.sized(bucket(self.context, SMALLEST_CAPACITY))
        self.capacity = capacity_for(model, self.policy, self.context, 0)
        budget = whole("prefix_bytes", prefix_bytes, least=0, most=2**62)
        if budget and not self.policy.chunk_invariant:
            raise ValueError(
                f"policy {self.policy.name!r} reads a prompt at once, and a text would depend on "
                "where an earlier one ended; take full or streaming, or prefix_bytes=0"
            )
        truncates = can_truncate(model.config, self.policy, model.params)
        self.prefixes: PrefixCache[Cache] = PrefixCache(budget, truncates=truncates)
        self._check_memory()
        self.engine = model.engine.serving(self.policy)
        slot_programs(self.engine)
        self.contexts = [[0] * (self.context - 1)] * self.slots
        self.limits, self.samplers, self.endless = [1] * self.slots, [GREEDY] * self.slots, False
        self.plan = None if draft is None else draft.plan(self)
        most = 1 if self.plan is None else self.plan.most
        self.buffer = max(ENDLESS_BUFFER, bucket(most, 1))  # emitted tokens that a row remembers
        self.steps = max(1, min(STREAM_STEPS, self.buffer // most))

    @property
    def piece(self) -> int:
        """Tokens of a prompt that are read at once, at most."""
        return piece_size(self.policy.layer_policies(self.model.config.num_layers), self.chunk)

    def batch(self) -> SlotBatch[Request]:
        """Slots without rows."""
        if self.plan is None:
            return SlotBatch(self.engine, plain_step, self.slots)
        return SlotBatch(self.plan.engine, self.plan.step, self.slots)

    def reader(self, request: Request) -> PromptReader:
        """What reads the prompt of a request."""
        scored, cached, scope = request.extras.prompt_log_probs, None, request.extras.prefix_scope
        if scope is not None and not scored:  # the last token is read for its logits
            found = self.prefixes.find(scope, request.tokens[:-1])
            if found is not None:
                cached = self.copied(found.held, found.length)
                request.cached_tokens = found.length
        return PromptReader(
            self.engine, self.policy, self.capacity, request.tokens, self.chunk, scored=scored,
            cached=cached,
        )  # fmt: skip

    def copied(self, cache: Cache, length: int) -> Cache:
        """A copy of a cache of one row, cut to `length` tokens."""
        return self.engine.programs["row_of"](cache, jnp.int32(0), jnp.int32(length))

    def keep_prompt(self, request: Request, cache: Cache) -> None:
        """Remembers that a prompt was read, for those that begin like it."""
        self._keep(request, request.tokens, lambda length: self.copied(cache, length))

    def leaves(self, request: Request, batch: object) -> None:
        """Notes what a row has come to before it leaves its slot."""
        assert isinstance(batch, SlotBatch)
        if self.plan is not None:
            request.step_tokens = self.plan.step_tokens(batch.state, batch.owners[request])
        if self.prefixes.budget:
            self.keep_answer(request, batch)

    @property
    def programs(self) -> dict[str, int]:
        """Compiled programs by name."""
        return {name: len(one) for name, one in self.engine.programs.items() if len(one)}

    @property
    def prefix_bytes(self) -> int:
        """Bytes of what stays of texts."""
        return self.prefixes.bytes

    @property
    def fingerprint(self) -> str:
        """A short hash of the model's configuration and weights."""
        return identity(self.model.config, self.model.params)

    def warm(self) -> None:
        """Compiles whatever requests may need."""
        from jaxinfer.decode.slot_warmup import warm  # which knows this class

        warm(self)

    def close(self) -> None:
        """Nothing serves beside this process."""

    def keep_answer(self, request: Request, batch: SlotBatch[Request]) -> None:
        """Remembers a prompt and what was made behind it, also of an answer that was cut short."""
        if self.prefixes.truncates or request.is_whole:
            tokens = request.read_by_row
            self._keep(request, tokens, lambda length: batch.cache_of(request, length))

    def _keep(self, request: Request, tokens: list[int], copy: Callable[[int], Cache]) -> None:
        scope, prefixes = request.extras.prefix_scope, self.prefixes
        if scope is None or request.cache_bytes > prefixes.budget or prefixes.covers(scope, tokens):
            return
        prefixes.put(scope, tokens, copy(len(tokens)), request.cache_bytes)

    def row(self, request: Request, reader: object) -> Row:
        """The row of a request whose prompt a `PromptReader` has read, with its first token
        drawn."""
        assert isinstance(reader, PromptReader) and reader.cache is not None
        requests = request.arrays()
        request.cache_bytes = bytes_of(reader.cache.layers)
        if self.prefixes.budget:
            self.keep_prompt(request, reader.cache)
        state = self.engine.init_state(
            reader.cache, reader.logits, requests, request.seen(), self.buffer
        )
        if self.plan is not None:
            state = self.plan.init_state(state, [request.tokens])
        return Row(state, requests)

    def check_room(self, request: Request) -> None:
        """Refuses a request that a slot cannot hold.

        Raises:
          ValueError: prompt and answer together are longer than the context.
        """
        prompt, new = len(request.tokens), request.limit
        if prompt + new > self.context:
            raise ValueError(
                f"{prompt} prompt + {new} new tokens exceed the {self.context} of a slot; shorten "
                "the prompt, lower max_new_tokens, or make a batcher with a larger context"
            )
        check_room(self.model, self.policy, self.capacity, prompt, new)

    def _check_memory(self) -> None:
        """All slots, the prompt that is read, and the half of the slots that a resize moves."""
        cfg, policy = self.model.config, self.policy
        engine = self.model.engine
        geometry = cache_geometry(cfg, self.capacity, engine.dtype, engine.backend)
        check_cache(cfg, policy, geometry, self.model.params)
        self.row_bytes = row = cache_bytes_per_row(cfg, policy, geometry, self.model.params)
        rows, block = self.slots + self.slots // 2 + 1, geometry.backend.block or self.capacity
        block = min(block, self.capacity)
        parts = memory.estimate(
            cfg, cache_bytes=rows * row, batch=self.slots, new=ENDLESS_BUFFER, block=block
        )
        read = memory.estimate(
            cfg, cache_bytes=0, tokens=min(self.piece, self.context), block=block
        )
        parts["prompt"] = sum(read.values())
        memory.check_available(parts | {"prefixes": self.prefixes.budget})
