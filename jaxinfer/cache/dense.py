"""Dense segments, and the tier that keeps every token.

Token t of a row sits in slot t. On the CPU bfloat16 is stored as uint16 bits: XLA CPU would convert
the whole cache to float32 and back for each update (measured 58 against 13 ms). Bytes per row and
layer: `2 * K * H * capacity * itemsize`.
"""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxinfer.cache.base import Geometry, Items, QueryPhase, write_index
from jaxinfer.ops.attention import (
    AttentionSpec,
    KeyLayout,
    Partial,
    empty_partial,
    key_mass,
    merge,
    partial_attention,
)
from jaxinfer.typing import Leaf


@dataclass(frozen=True, kw_only=True)
class DenseSegment:
    """Keys and values as arrays; slots [start, stop) are the ones any row may use."""

    k: Array  # [B, K, H, S] or [B, K, S, H]
    v: Array  # [B, K, S, H]
    pos: Array  # i32[B|1, K|1, S]
    ok: Array  # bool[B, K|1, S]
    stop: Array  # i32[]
    layout: KeyLayout
    block: int | None
    query_phase: QueryPhase = "absolute"

    def partial(self, spec: AttentionSpec, q: Array, q_pos: Array, see) -> Partial:
        capacity = self.v.shape[2]

        def attend(k, v, pos, ok):
            distance, visible = see(pos, ok)
            return partial_attention(spec, q, load(k), load(v), distance, visible, self.layout)

        if self.block is None or capacity <= self.block:
            return attend(self.k, self.v, self.pos, self.ok)

        # Blocks of slots up to the live length: time follows what is stored, not the capacity. The
        # last block of a capacity that is no multiple starts earlier and masks what came before.
        block = self.block
        start = 0
        if spec.window is not None:
            oldest = jnp.min(q_pos) - spec.window + 1
            start = jnp.maximum(oldest, 0) // block
        key_axis = 3 if self.layout == "BKHS" else 2

        def body(i, partial):
            first = jnp.minimum(i * block, capacity - block)
            take = lambda x, axis: jax.lax.dynamic_slice_in_dim(x, first, block, axis)  # noqa: E731
            new = (first + jnp.arange(block)) >= i * block
            ok = take(self.ok, 2) & new
            return merge(
                partial, attend(take(self.k, key_axis), take(self.v, 2), take(self.pos, 2), ok)
            )

        return jax.lax.fori_loop(start, (self.stop + block - 1) // block, body, empty_partial(q))

    def key_mass(self, spec: AttentionSpec, q: Array, q_pos: Array, see, lse: Array) -> Array:
        distance, visible = see(self.pos, self.ok)
        return key_mass(spec, q, load(self.k), distance, visible, lse, self.layout)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DenseState:
    k: Leaf  # [B, K, H, S] or [B, K, S, H]
    v: Leaf  # [B, K, S, H]
    layout: KeyLayout = field(default="BKHS", metadata={"static": True})
    block: int | None = field(default=128, metadata={"static": True})


@dataclass(frozen=True, kw_only=True)
class Dense:
    """Keeps every token in full precision and passes nothing on."""

    def init(self, geometry: Geometry, batch: int) -> DenseState:
        b, k, s, h = batch, geometry.num_kv_heads, geometry.capacity, geometry.head_dim
        dtype = storage_dtype(geometry)
        keys = (b, k, h, s) if geometry.key_layout == "BKHS" else (b, k, s, h)
        return DenseState(
            k=jnp.zeros(keys, dtype),
            v=jnp.zeros((b, k, s, h), dtype),
            layout=geometry.key_layout,
            block=geometry.block,
        )

    def kept(self, n_in: Array) -> Array:
        return n_in

    def passed(self, n_in: Array) -> Array:
        return jnp.zeros_like(n_in)

    def segments(self, state: DenseState, aux, n_in: Array) -> tuple[DenseSegment, ...]:
        capacity = state.v.shape[2]
        slots = jnp.arange(capacity, dtype=jnp.int32)[None, None]
        return (
            DenseSegment(
                k=state.k,
                v=state.v,
                pos=slots,
                ok=slots < n_in[:, None, None],
                stop=jnp.max(n_in),
                layout=state.layout,
                block=state.block,
            ),
        )

    def push(self, state: DenseState, aux, items: Items, n_in: Array, count: Array, after: Array):
        batch, capacity = n_in.shape[0], state.v.shape[2]
        order = jnp.arange(items.v.shape[2], dtype=jnp.int32)
        index = jnp.where(order < count[:, None], n_in[:, None] + order, capacity)
        index = write_index(index, capacity, after)
        rows = jnp.arange(batch)[:, None]
        k = store(items.k, state.k.dtype).transpose(0, 2, 1, 3)  # [B, A, K, H]
        v = store(items.v, state.v.dtype).transpose(0, 2, 1, 3)
        if state.layout == "BKHS":
            keys = state.k.at[rows, :, :, index].set(k, mode="drop")
        else:
            keys = state.k.at[rows, :, index].set(k, mode="drop")
        values = state.v.at[rows, :, index].set(v, mode="drop")
        return replace(state, k=keys, v=values), None, jnp.zeros_like(count)

    def grow(self, state: DenseState, capacity: int) -> DenseState:
        more = max(capacity - state.v.shape[2], 0)
        token_axis = 3 if state.layout == "BKHS" else 2
        widths = [(0, more if axis == token_axis else 0) for axis in range(4)]
        return replace(
            state,
            k=jnp.pad(state.k, widths),
            v=jnp.pad(state.v, [(0, 0), (0, 0), (0, more), (0, 0)]),
        )

    def bytes_per_row(self, geometry: Geometry) -> int:
        size = jnp.dtype(storage_dtype(geometry)).itemsize
        return 2 * geometry.num_kv_heads * geometry.head_dim * geometry.capacity * size


def storage_dtype(geometry: Geometry) -> jnp.dtype:
    bits = geometry.dtype == "bfloat16" and geometry.key_layout == "BKHS"
    return jnp.dtype("uint16" if bits else geometry.dtype)


def load(x: Array) -> Array:
    """Stored numbers as floats."""
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def store(x: Array, dtype: jnp.dtype) -> Array:
    """Floats as stored numbers."""
    if dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    return x.astype(dtype)
