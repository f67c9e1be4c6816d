"""Attention over dense slots, and the tier that keeps every token.

Token t of a row sits in slot t. Bytes per row and layer: `2 * K * H * capacity * itemsize`.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxinfer.cache.base import Geometry, Items, QueryPhase, Tier, write_index
from jaxinfer.cache.context import PushContext
from jaxinfer.cache.slots import Slots, load, new_slots, put, slot_bytes
from jaxinfer.ops.attention import (
    AttentionSpec,
    Partial,
    empty_partial,
    key_weights,
    merge,
    partial_attention,
)
from jaxinfer.ops.stored import attend_heads, attend_stored, stored_weights
from pallas_kernels.softmax_state import ExtraKeys


@dataclass(frozen=True, kw_only=True)
class DenseSegment:
    """Slots of which [0, stop) are the ones that any row may use.

    `length`, if known, says that row b uses just the first `length[b]`. With `heads` each row's
    only query reads the keys and values of these heads and no others.
    """

    slots: Slots
    pos: Array  # i32[B|1, K|1, C]
    ok: Array  # bool[B, K|1, C]
    stop: Array  # i32[]
    query_phase: QueryPhase = "absolute"
    in_order: bool = True  # slot t holds position t, so a sliding window starts at a known slot
    holds_tokens: bool = True
    length: Array | None = None  # i32[B]
    heads: Array | None = None  # bool[B, K]

    @property
    def capacity(self) -> int:
        return self.slots.capacity

    def reads_heads(self, spec: AttentionSpec) -> bool:
        """Whether a kernel can read some heads alone."""
        plain = spec.softcap is None and spec.window is None and spec.slopes is None
        return plain and self.length is not None and self.slots.backend.has_kernels

    def partial(self, spec: AttentionSpec, q: Array, q_pos: Array, mask_fn) -> Partial:
        if self.heads is not None and self.length is not None:
            return attend_heads(
                spec, q, load(self.slots.k), load(self.slots.v), self.length, self.heads,
                backend=self.slots.backend,
            )  # fmt: skip
        if not self._is_blocked:
            return self._at_once(spec, q, mask_fn)
        layout, start = self.slots.layout, 0
        if spec.window is not None and self.in_order:
            oldest = jnp.min(q_pos) - spec.window + 1
            start = jnp.maximum(oldest, 0) // self._size

        def body(i, partial):
            first, ok = self._block(i)
            k, pos = self._keys(first), self._take(self.pos, first, 2)
            v = load(self._take(self.slots.v, first, 2))
            distance, visible = mask_fn(pos, ok)
            new = partial_attention(spec, q, k, v, distance, visible, layout)
            return merge(partial, new)

        return jax.lax.fori_loop(start, self._blocks, body, empty_partial(q))

    @property
    def ends_softmax(self) -> bool:
        return self.slots.layout == "BKSH" and not self._is_blocked and self.heads is None

    def output(self, spec: AttentionSpec, q: Array, mask_fn, extra: ExtraKeys) -> Array:
        return self._at_once(spec, q, mask_fn, extra)

    def _at_once(self, spec: AttentionSpec, q: Array, mask_fn, extra: ExtraKeys | None = None):
        distance, visible = mask_fn(self.pos, self.ok)
        return attend_stored(
            spec, q, load(self.slots.k), load(self.slots.v), distance, visible, self.stop, extra,
            backend=self.slots.backend,
        )  # fmt: skip

    def key_weights(
        self, spec: AttentionSpec, q: Array, q_pos: Array, mask_fn, lse: Array
    ) -> Array:
        layout = self.slots.layout
        if not self._is_blocked:
            distance, visible = mask_fn(self.pos, self.ok)
            return stored_weights(
                spec, q, load(self.slots.k), distance, visible, lse, self.stop,
                backend=self.slots.backend,
            )  # fmt: skip

        def body(i, attn_weight):
            first, ok = self._block(i)
            distance, visible = mask_fn(self._take(self.pos, first, 2), ok)
            new = key_weights(spec, q, self._keys(first), distance, visible, lse, layout)
            # The first slots of an overlapping last block are masked there and have theirs.
            return attn_weight.at[..., first + jnp.arange(self._size)].add(new)

        batch, heads, _, size, _ = q.shape
        empty = jnp.zeros((batch, heads, size, self.slots.capacity), jnp.float32)
        return jax.lax.fori_loop(0, self._blocks, body, empty)

    # Blocks of slots up to the live length: time follows what is stored, not the capacity. The
    # last block of a capacity that is no multiple starts earlier and masks what came before.

    @property
    def _is_blocked(self) -> bool:
        return self.slots.capacity > self._size

    @property
    def _size(self) -> int:
        """Slots of a block."""
        return self.slots.backend.block or self.slots.capacity

    @property
    def _blocks(self) -> Array:
        return (self.stop + self._size - 1) // self._size

    def _block(self, i: Array) -> tuple[Array, Array]:
        """The first slot of block i, and which of its slots count."""
        block = self._size
        first = jnp.minimum(i * block, self.slots.capacity - block)
        return first, self._take(self.ok, first, 2) & ((first + jnp.arange(block)) >= i * block)

    def _keys(self, first: Array) -> Array:
        return load(self._take(self.slots.k, first, 3 if self.slots.layout == "BKHS" else 2))

    def _take(self, x: Array, first: Array, axis: int) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, first, self._size, axis)


@dataclass(frozen=True, kw_only=True)
class Dense(Tier):
    """Keeps every token in full precision and passes nothing on."""

    @property
    def grows(self) -> bool:
        return True

    @property
    def truncates(self) -> bool:
        return True

    def init(self, geometry: Geometry, batch: int) -> Slots:
        return new_slots(geometry, batch, geometry.capacity)

    def segments(self, state: Slots, aux, n_in: Array) -> tuple[DenseSegment, ...]:
        slots = jnp.arange(state.capacity, dtype=jnp.int32)[None, None]
        ok = slots < n_in[:, None, None]
        return (DenseSegment(slots=state, pos=slots, ok=ok, stop=jnp.max(n_in), length=n_in),)

    def push(self, state: Slots, aux, items: Items, ctx: PushContext):
        order = jnp.arange(items.v.shape[2], dtype=jnp.int32)
        index = jnp.where(order < ctx.count[:, None], ctx.n_in[:, None] + order, state.capacity)
        index = write_index(index, state.capacity, ctx.after)
        return put(state, items, index), None, jnp.zeros_like(ctx.count)

    def grow(self, state: Slots, capacity: int) -> Slots:
        more = max(capacity - state.capacity, 0)
        token_axis = 3 if state.layout == "BKHS" else 2
        widths = [(0, more if axis == token_axis else 0) for axis in range(4)]
        return replace(
            state,
            k=jnp.pad(state.k, widths),
            v=jnp.pad(state.v, [(0, 0), (0, 0), (0, more), (0, 0)]),
        )

    def bytes_per_row(self, geometry: Geometry) -> int:
        return slot_bytes(geometry, geometry.capacity)
