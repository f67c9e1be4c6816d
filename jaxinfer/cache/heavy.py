"""Heavy hitters: per head, the tokens that have received most attention (H2O, arXiv 2306.14048).

The tier takes what leaves the recent ring and keeps the `size` tokens of most accumulated
probability; every step evicts the least of stored and new ones (algorithm 1 there). Heads differ in
what they keep, so slots carry positions. Ties keep the stored token. Bytes per row and layer:
`K * size * (2 * H * itemsize + 8)`, the last term for attention weight and position, and 4 more
where the budget is a share of the row's prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax.numpy as jnp
from jaxtyping import Array

from jaxinfer.cache.base import Geometry, Items, Tier, write_index
from jaxinfer.cache.context import PushContext
from jaxinfer.cache.dense import DenseSegment
from jaxinfer.cache.ring import (
    budget_bytes,
    check_budget,
    items_at,
    tokens_of,
    whole,
    with_budgets,
)
from jaxinfer.cache.slots import Slots, either, get, new_slots, put, slot_bytes, swap, usable

EMPTY = -jnp.inf


@dataclass(frozen=True, kw_only=True)
class Heavy(Tier):
    """Keeps `size` tokens (or, as in `Ring`, a share of the prompt) per row and key/value head."""

    size: int | float
    share: float | None = field(default=None, compare=False)  # that `size` was; seen in the state

    def __post_init__(self):
        check_budget("heavy", self.size)

    def sized(self, context: int) -> "Heavy":
        if not isinstance(self.size, float):
            return self
        return replace(self, size=tokens_of(self.size, context), share=self.size)

    def budgeted(self, state: Slots, contexts: Sequence[int]) -> Slots:
        return with_budgets(state, self.share, contexts)

    def init(self, geometry: Geometry, batch: int) -> Slots:
        size = whole(self.size)
        shape = (batch, geometry.num_kv_heads, size)
        return replace(
            with_budgets(new_slots(geometry, batch, size), self.share, None),
            attn_weight=jnp.full(shape, EMPTY, jnp.float32),
            pos=jnp.zeros(shape, jnp.int32),
        )

    def passed(self, n_in: Array) -> Array:
        return jnp.maximum(n_in - whole(self.size), 0)

    def passed_by(self, state: Slots, n_in: Array) -> Array:
        return jnp.maximum(n_in - usable(state), 0)

    def segments(self, state: Slots, aux, n_in: Array) -> tuple[DenseSegment, ...]:
        kept = jnp.minimum(n_in, usable(state))  # slots fill in order, in every head
        ok = jnp.arange(state.capacity, dtype=jnp.int32) < kept[:, None, None]
        stop = jnp.max(kept)
        return (DenseSegment(slots=state, pos=state.pos, ok=ok, stop=stop, in_order=False),)

    def push(self, state: Slots, aux, items: Items, ctx: PushContext):
        n_in, count = ctx.n_in, ctx.count
        size, gone = state.capacity, None
        if ctx.stored_weights:
            state = replace(state, attn_weight=state.attn_weight + ctx.stored_weights[0])
        if items.v.shape[2] == 1:
            index = self._place_of_one(state, items, count)
        else:
            index, gone = self._choose(state, items, n_in, count)
        index = write_index(index, size, ctx.after)
        spilled_count = self.passed_by(state, n_in + count) - self.passed_by(state, n_in)
        if not ctx.spills:
            return put(state, items, index), None, spilled_count
        if gone is None:  # what leaves lies where the new token goes, or is that token
            return *swap(state, items, index), spilled_count
        spilled = self._at(state, items, gone)
        index = write_index(index, size, spilled.k, spilled.v)
        return put(state, items, index), spilled, spilled_count

    def _place_of_one(self, state: Slots, items: Items, count: Array) -> Array:
        """Where a single new token goes: it or the least of all stored ones leaves, no sort."""
        stored = state.attn_weight
        if state.budget is not None:
            stored = jnp.where(_usable_slots(state), stored, jnp.inf)
        least = jnp.argmin(stored, axis=-1, keepdims=True).astype(jnp.int32)
        enters = items.attn_weight > jnp.take_along_axis(stored, least, axis=-1)
        return jnp.where(enters & (count > 0)[:, None, None], least, state.capacity)

    def _choose(self, state: Slots, items: Items, n_in: Array, count: Array):
        """Where each new token goes (`size`: nowhere), and which of stored and new ones leave."""
        size, width = state.capacity, items.v.shape[2]
        valid = jnp.arange(width, dtype=jnp.int32) < count[:, None, None]
        valid = jnp.broadcast_to(valid, items.attn_weight.shape)
        attn_weight = jnp.concatenate(
            [state.attn_weight, jnp.where(valid, items.attn_weight, EMPTY)], axis=-1
        )
        # Rank among all tokens; the sort is stable, so that ties keep what is stored.
        rank = jnp.argsort(jnp.argsort(-attn_weight, axis=-1, stable=True), axis=-1)
        may = _usable_slots(state)
        stored = (jnp.arange(size, dtype=jnp.int32) < n_in[:, None, None]) & may
        stored = jnp.broadcast_to(stored, state.attn_weight.shape)
        taken = jnp.concatenate([stored, valid], axis=-1)
        survives = taken & (rank < usable(state, axes=2))
        # The j-th new survivor takes the j-th slot whose token leaves or was never there.
        free = positions_of(~survives[..., :size] & may, width)
        enters = survives[..., size:]
        turn = jnp.maximum(jnp.cumsum(enters, axis=-1) - 1, 0)
        index = jnp.where(enters, jnp.take_along_axis(free, turn, axis=-1), size)
        return index, positions_of(taken & ~survives, width)

    def _at(self, state: Slots, items: Items, index: Array) -> Items:
        """Tokens `index` [B, K, A] of the stored and then the new ones."""
        size, width = state.capacity, items.v.shape[2]
        new = items_at(items, jnp.clip(index - size, 0, width - 1))
        return either(index < size, get(state, jnp.minimum(index, size - 1)), new)

    def bytes_per_row(self, geometry: Geometry) -> int:
        size = whole(self.size)
        held = 8 * geometry.num_kv_heads * size
        return slot_bytes(geometry, size) + held + budget_bytes(self.share)


def _usable_slots(state: Slots) -> Array:
    """bool[B|1, 1, C]: the slots that each row may use."""
    return jnp.arange(state.capacity, dtype=jnp.int32)[None, None] < usable(state, axes=2)


def positions_of(mask: Array, width: int) -> Array:
    """Indices [B, K, width] of the first true entries in order; what is behind them is any."""
    size = mask.shape[-1]
    order = jnp.where(mask, 0, size) + jnp.arange(size, dtype=jnp.int32)
    found = jnp.argsort(order, axis=-1).astype(jnp.int32)[..., :width]
    short = width - found.shape[-1]
    return jnp.pad(found, [(0, 0), (0, 0), (0, short)], mode="edge") if short > 0 else found
