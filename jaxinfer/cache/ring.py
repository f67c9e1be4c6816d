"""Sinks and rings: the first tokens of a row for good, and its most recent ones.

`Sinks(S)` keeps a row's first S tokens and passes on all others. `Ring(W)` keeps the last W that
entered it: token t of the tier sits in slot t mod W, and what it overwrites spills into the next
tier. Nothing is shifted and nothing is compacted. Together they are the cache of StreamingLLM
(arXiv 2309.17453, section 3.2), the ring alone is the recent part of H2O. Bytes per row and layer:
`2 * K * H * C * itemsize` for C slots, and 4 K C more where the mass is observed.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxinfer.cache.base import Geometry, Items, QueryPhase, write_index
from jaxinfer.cache.dense import DenseSegment
from jaxinfer.cache.slots import Slots, get, new_slots, put, slot_bytes
from jaxinfer.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Sinks:
    """Keeps the first `size` tokens of a row."""

    size: int
    query_phase: QueryPhase = "in_cache"

    @property
    def grows(self) -> bool:
        return False

    def __post_init__(self):
        check_tokens("sinks", self.size, least=1)

    def sized(self, context: int) -> "Sinks":
        return self

    def check(self, cfg: ModelConfig, geometry: Geometry) -> None:
        pass

    def init(self, geometry: Geometry, batch: int) -> Slots:
        return new_slots(geometry, batch, self.size)

    def kept(self, n_in: Array) -> Array:
        return jnp.minimum(n_in, self.size)

    def passed(self, n_in: Array) -> Array:
        return jnp.maximum(n_in - self.size, 0)

    def segments(self, state: Slots, aux, n_in: Array) -> tuple[DenseSegment, ...]:
        slots = jnp.arange(self.size, dtype=jnp.int32)[None, None]
        kept = self.kept(n_in)
        ok = slots < kept[:, None, None]
        phase = self.query_phase
        return (DenseSegment(slots=state, pos=slots, ok=ok, stop=jnp.max(kept), query_phase=phase),)

    def observe(self, state: Slots, masses: tuple[Array, ...]) -> Slots:
        return state

    def push(self, state: Slots, aux, items: Items, n_in: Array, count: Array, after: Array):
        width = items.v.shape[2]
        order = jnp.arange(width, dtype=jnp.int32)
        slot = n_in[:, None] + order
        index = jnp.where((order < count[:, None]) & (slot < self.size), slot, self.size)
        state = put(state, items.k, items.v, write_index(index, self.size, after))
        skip = jnp.clip(self.size - n_in, 0, count)
        rest = jnp.minimum(order + skip[:, None], width - 1)
        return state, items_at(items, rest), count - skip

    def grow(self, state: Slots, capacity: int) -> Slots:
        return state

    def bytes_per_row(self, geometry: Geometry) -> int:
        return slot_bytes(geometry, self.size)


@dataclass(frozen=True, kw_only=True)
class Ring:
    """Keeps the last `size` tokens that entered, the first of which has position `start`.

    `size` may be a share (float) of the context; `sized` turns it into tokens.
    """

    size: int | float
    start: int = 0
    observes: bool = False  # keeps the key mass and passes it on with what it spills

    @property
    def grows(self) -> bool:
        return False

    def __post_init__(self):
        check_budget("window" if not self.observes else "recent", self.size)

    def sized(self, context: int) -> "Ring":
        return replace(self, size=tokens_of(self.size, context))

    def check(self, cfg: ModelConfig, geometry: Geometry) -> None:
        pass

    def init(self, geometry: Geometry, batch: int) -> Slots:
        slots = new_slots(geometry, batch, whole(self.size))
        if not self.observes:
            return slots
        mass = jnp.zeros((batch, geometry.num_kv_heads, slots.capacity), jnp.float32)
        return replace(slots, mass=mass)

    def kept(self, n_in: Array) -> Array:
        return jnp.minimum(n_in, whole(self.size))

    def passed(self, n_in: Array) -> Array:
        return jnp.maximum(n_in - whole(self.size), 0)

    def segments(self, state: Slots, aux, n_in: Array) -> tuple[DenseSegment, ...]:
        size = state.capacity
        slots = jnp.arange(size, dtype=jnp.int32)[None, None]
        newest = n_in[:, None, None] - 1
        token = newest - jnp.mod(newest - slots, size)  # the last one that went into the slot
        return (
            DenseSegment(
                slots=state,
                pos=self.start + token,
                ok=token >= 0,
                stop=jnp.max(self.kept(n_in)),
                in_order=False,
            ),
        )

    def observe(self, state: Slots, masses: tuple[Array, ...]) -> Slots:
        return replace(state, mass=state.mass + masses[0]) if self.observes else state

    def push(self, state: Slots, aux, items: Items, n_in: Array, count: Array, after: Array):
        size, width = state.capacity, items.v.shape[2]
        order = jnp.arange(width, dtype=jnp.int32)
        spilled, spilled_count = self._spill(state, items, n_in, count)
        # Read once: XLA:GPU would repeat the gather for each of its users, of which only those
        # that `write_index` knows of are sure to come before the write.
        spilled = jax.lax.optimization_barrier(spilled)
        # Of more tokens than slots only the last ones are written: no slot twice.
        written = (order < count[:, None]) & (order >= count[:, None] - size)
        index = jnp.where(written, jnp.mod(n_in[:, None] + order, size), size)
        # What spills was read from the slots, and the mass pass read the keys a second time.
        index = write_index(index, size, after, spilled.k, spilled.v, state.mass)
        new = put(state, items.k, items.v, index)
        if self.observes:
            rows = jnp.arange(index.shape[0])[:, None]
            mass = state.mass.at[rows, :, index].set(items.mass.transpose(0, 2, 1), mode="drop")
            new = replace(new, mass=mass)
        return new, spilled, spilled_count

    def _spill(self, state: Slots, items: Items, n_in: Array, count: Array) -> tuple[Items, Array]:
        """The tokens that leave, oldest first: from the slots, then of the new ones themselves."""
        size, width = state.capacity, items.v.shape[2]
        first = jnp.maximum(n_in - size, 0)
        token = first[:, None] + jnp.arange(width, dtype=jnp.int32)
        old = (token < n_in[:, None])[:, None, :]
        slot = jnp.mod(token, size)[:, None]
        fresh = items_at(items, jnp.clip(token - n_in[:, None], 0, width - 1))
        k, v = get(state, slot)
        spilled = Items(
            k=jnp.where(old[..., None], k, fresh.k),
            v=jnp.where(old[..., None], v, fresh.v),
            pos=(self.start + token)[:, None],
        )
        if self.observes:
            stored = jnp.take_along_axis(state.mass, jnp.broadcast_to(slot, k.shape[:3]), axis=2)
            spilled = replace(spilled, mass=jnp.where(old, stored, fresh.mass))
        return spilled, self.passed(n_in + count) - first

    def grow(self, state: Slots, capacity: int) -> Slots:
        return state

    def bytes_per_row(self, geometry: Geometry) -> int:
        size = whole(self.size)
        mass = 4 * geometry.num_kv_heads * size if self.observes else 0
        return slot_bytes(geometry, size) + mass


def items_at(items: Items, index: Array) -> Items:
    """Entries `index` i32[B, A] (per head: [B, K, A]) of the tokens."""
    if index.ndim == 2:
        index = index[:, None]

    def take(x: Array) -> Array:
        shape = (*index.shape, *(1,) * (x.ndim - 3))
        return jnp.take_along_axis(x, index.reshape(shape), axis=2)

    return jax.tree.map(take, items)


def check_tokens(name: str, tokens: Any, least: int) -> None:
    """Refuses what is no number of tokens, or fewer than `least`."""
    is_whole = isinstance(tokens, int | np.integer) and not isinstance(tokens, bool)
    if not (is_whole and tokens >= least):
        raise ValueError(f"{name} must be {least} or more whole tokens, got {tokens!r}")


def check_budget(name: str, budget: int | float) -> None:
    """Refuses a budget that holds no token."""
    if not isinstance(budget, float):
        check_tokens(name, budget, least=1)
    elif not 0 < budget <= 1:
        raise ValueError(
            f"{name} must be a share in (0, 1] of the context, or whole tokens, got {budget!r}"
        )


def tokens_of(budget: int | float, context: int) -> int:
    """Tokens of a budget that may be a share of `context`, at least 1."""
    return max(int(budget * context), 1) if isinstance(budget, float) else budget


def whole(budget: int | float) -> int:
    """A budget in tokens; a share must have been turned into tokens before."""
    if isinstance(budget, float):
        raise ValueError(
            f"the budget {budget!r} is a share of the context; call policy.sized(context) first"
        )
    return budget
