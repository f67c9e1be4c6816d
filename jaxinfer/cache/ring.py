"""Sinks and rings: the first tokens of a row for good, and its most recent ones.

`Sinks(S)` keeps a row's first S tokens and passes on all others. `Ring(W)` keeps the last W that
entered it: token t of the tier sits in slot t mod W, and what it overwrites spills into the next
tier. Nothing is shifted and nothing is compacted. Together they are the cache of StreamingLLM
(arXiv 2309.17453, section 3.2), the ring alone is the recent part of H2O. Bytes per row and layer:
`2 * K * H * C * itemsize` for C slots, 4 K C more where attention weights are kept, and 4 more
where the budget is a share of the row's prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxinfer.arguments import LARGEST, shown
from jaxinfer.cache.base import Geometry, Items, QueryPhase, Tier, write_index
from jaxinfer.cache.context import PushContext
from jaxinfer.cache.dense import DenseSegment
from jaxinfer.cache.slots import Slots, either, get, new_slots, put, slot_bytes, swap, usable


@dataclass(frozen=True, kw_only=True)
class Sinks(Tier):
    """Keeps the first `size` tokens of a row."""

    size: int
    query_phase: QueryPhase = "in_cache"

    def __post_init__(self):
        check_tokens("sinks", self.size, least=1)

    def init(self, geometry: Geometry, batch: int) -> Slots:
        return new_slots(geometry, batch, self.size)

    def passed(self, n_in: Array) -> Array:
        return jnp.maximum(n_in - self.size, 0)

    def segments(self, state: Slots, aux, n_in: Array) -> tuple[DenseSegment, ...]:
        slots = jnp.arange(self.size, dtype=jnp.int32)[None, None]
        kept = jnp.minimum(n_in, self.size)
        ok = slots < kept[:, None, None]
        phase = self.query_phase
        return (DenseSegment(slots=state, pos=slots, ok=ok, stop=jnp.max(kept), query_phase=phase),)

    def push(self, state: Slots, aux, items: Items, ctx: PushContext):
        n_in, count, width = ctx.n_in, ctx.count, items.v.shape[2]
        order = jnp.arange(width, dtype=jnp.int32)
        slot = n_in[:, None] + order
        index = jnp.where((order < count[:, None]) & (slot < self.size), slot, self.size)
        state = put(state, items, write_index(index, self.size, ctx.after))
        skip = jnp.clip(self.size - n_in, 0, count)
        rest = jnp.minimum(order + skip[:, None], width - 1)
        return state, items_at(items, rest), count - skip

    def bytes_per_row(self, geometry: Geometry) -> int:
        return slot_bytes(geometry, self.size)


@dataclass(frozen=True, kw_only=True)
class Ring(Tier):
    """Keeps the last `size` tokens that entered, the first of which has position `start`.

    `size` may be a share (float) of each row's prompt: `sized` turns it into the slots that a
    prompt needs at most, and `budgeted` says how many of them a row uses.
    """

    size: int | float
    start: int = 0
    keeps_weights: bool = False  # keeps attention weights and passes them on with what it spills
    share: float | None = field(default=None, compare=False)  # that `size` was; seen in the state

    def __post_init__(self):
        check_budget("window" if not self.keeps_weights else "recent", self.size)

    def sized(self, context: int) -> "Ring":
        if not isinstance(self.size, float):
            return self
        return replace(self, size=tokens_of(self.size, context), share=self.size)

    def budgeted(self, state: Slots, contexts: Sequence[int]) -> Slots:
        return with_budgets(state, self.share, contexts)

    def init(self, geometry: Geometry, batch: int) -> Slots:
        slots = new_slots(geometry, batch, whole(self.size))
        slots = with_budgets(slots, self.share, None)
        if not self.keeps_weights:
            return slots
        attn_weight = jnp.zeros((batch, geometry.num_kv_heads, slots.capacity), jnp.float32)
        return replace(slots, attn_weight=attn_weight)

    def passed(self, n_in: Array) -> Array:
        return jnp.maximum(n_in - whole(self.size), 0)

    def passed_by(self, state: Slots, n_in: Array) -> Array:
        return jnp.maximum(n_in - usable(state), 0)

    def segments(self, state: Slots, aux, n_in: Array) -> tuple[DenseSegment, ...]:
        size = usable(state, axes=2)
        slots = jnp.arange(state.capacity, dtype=jnp.int32)[None, None]
        newest = n_in[:, None, None] - 1
        token = newest - jnp.mod(newest - slots, size)  # the last one that went into the slot
        ok = token >= 0
        return (
            DenseSegment(
                slots=state,
                pos=self.start + token,
                ok=ok if state.budget is None else ok & (slots < size),
                stop=jnp.max(jnp.minimum(n_in, usable(state))),
                in_order=False,
            ),
        )

    def push(self, state: Slots, aux, items: Items, ctx: PushContext):
        n_in, count = ctx.n_in, ctx.count
        width, size = items.v.shape[2], state.capacity
        ring = usable(state, axes=1)
        if self.keeps_weights and ctx.stored_weights:
            state = replace(state, attn_weight=state.attn_weight + ctx.stored_weights[0])
        order = jnp.arange(width, dtype=jnp.int32)
        # Of more tokens than slots only the last ones are written: no slot twice.
        written = (order < count[:, None]) & (order >= count[:, None] - ring)
        index = jnp.where(written, jnp.mod(n_in[:, None] + order, ring), size)
        index = write_index(index, size, ctx.after)
        spilled_count = self.passed_by(state, n_in + count) - self.passed_by(state, n_in)
        if not ctx.spills:
            return put(state, items, index), None, spilled_count
        first = self.passed_by(state, n_in)[:, None] + order
        if width == 1:  # what leaves lies where the new token goes
            state, spilled = swap(state, items, index)
        else:
            # Read once, see `swap`.
            spilled = jax.lax.optimization_barrier(self._leaving(state, items, n_in, first))
            state = put(state, items, write_index(index, size, spilled.k, spilled.v))
        return state, replace(spilled, pos=(self.start + first)[:, None]), spilled_count

    def _leaving(self, state: Slots, items: Items, n_in: Array, token: Array) -> Items:
        """The tokens `token` of those in the slots and then the new ones."""
        order = token - n_in[:, None]
        old = get(state, jnp.mod(token, usable(state, axes=1))[:, None])
        fresh = items_at(items, jnp.clip(order, 0, items.v.shape[2] - 1))
        return either((order < 0)[:, None], old, fresh)

    def bytes_per_row(self, geometry: Geometry) -> int:
        size = whole(self.size)
        attn_weight = 4 * geometry.num_kv_heads * size if self.keeps_weights else 0
        return slot_bytes(geometry, size) + attn_weight + budget_bytes(self.share)


def items_at(items: Items, index: Array) -> Items:
    """Entries `index` i32[B, A] (per head: [B, K, A]), all in range, of the tokens."""
    if items.v.shape[2] == index.shape[-1] == 1:
        return items  # which XLA does not know, and would gather
    if index.ndim == 2:
        index = index[:, None]

    def take(x: Array) -> Array:
        shape = (*index.shape, *(1,) * (x.ndim - 3))
        return jnp.take_along_axis(x, index.reshape(shape), axis=2)

    return jax.tree.map(take, items)


def check_tokens(name: str, tokens: Any, least: int) -> None:
    """Refuses what is no number of tokens, or fewer than `least`."""
    is_whole = isinstance(tokens, int | np.integer) and not isinstance(tokens, bool)
    if not (is_whole and least <= tokens <= LARGEST):
        raise ValueError(f"{name} must be {least} or more whole tokens, got {shown(tokens)}")


def check_budget(name: str, budget: int | float) -> None:
    """Refuses a budget that holds no token."""
    if not isinstance(budget, float):
        check_tokens(name, budget, least=1)
    elif not 0 < budget <= 1:
        raise ValueError(
            f"{name} must be a share in (0, 1] of the context, or whole tokens, got {shown(budget)}"
        )


def tokens_of(budget: int | float, context: int) -> int:
    """Tokens of a budget that may be a share of `context`: rounded down, at least 1.

    The share is the decimal number that was written: 0.29 of 100 tokens are 29, although the
    nearest float is a little less.
    """
    if not isinstance(budget, float):
        return budget
    return max(int(Fraction(repr(float(budget))) * context), 1)


def with_budgets(slots: Slots, share: float | None, contexts: Sequence[int] | None) -> Slots:
    """The slots with each row's share of its context; of all of the slots where that is None."""
    if share is None:
        return slots
    if contexts is None:
        return replace(slots, budget=jnp.full(slots.v.shape[:1], slots.capacity, jnp.int32))
    budgets = [min(tokens_of(share, context), slots.capacity) for context in contexts]
    return replace(slots, budget=jnp.asarray(budgets, jnp.int32))


def budget_bytes(share: float | None) -> int:
    """Bytes per row of the budgets of a share."""
    return 0 if share is None else 4


def whole(budget: int | float) -> int:
    """A budget in tokens; a share must have been turned into tokens before."""
    if isinstance(budget, float):
        raise ValueError(
            f"the budget {shown(budget)} is a share of the context; call "
            "policy.sized(context) first"
        )
    return budget
