"""Attention to packed tokens: block by block on a CPU, on a GPU by a kernel that unpacks them."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxinfer.cache.base import QueryPhase
from jaxinfer.cache.packed import Packed, decode
from jaxinfer.ops.attention import (
    AttentionSpec,
    Partial,
    empty_partial,
    key_weights,
    merge,
    partial_attention,
)
from jaxinfer.ops.stored import attend_packed
from jaxinfer.runtime.backend import Backend
from pallas_kernels.softmax_state import ExtraKeys, attended


@dataclass(frozen=True, kw_only=True)
class PackedSegment:
    """Quantized tokens; slots [0, stop) are the ones any row may use.

    With `block` the slots are unpacked that many at a time, never all of them at once. `first` is
    the position of slot 0 where positions count up with the slots, or None.
    """

    keys: Packed
    values: Packed
    pos: Array  # i32[B|1, 1, S]
    ok: Array  # bool[B, 1, S]
    stop: Array  # i32[]
    backend: Backend
    block: int | None
    first: int | None = 0
    query_phase: QueryPhase = "absolute"
    holds_tokens: bool = True

    @property
    def capacity(self) -> int:
        return self.pos.shape[2]

    def partial(self, spec: AttentionSpec, q: Array, q_pos: Array, mask_fn) -> Partial:
        size = self.capacity
        if self.backend.layout == "BKSH":
            return self._attend_at_once(spec, q, mask_fn)
        if self.block is None or size <= self.block:
            return self._attend(spec, q, mask_fn, 0, size, self.ok)
        block, start = self.block, 0
        if spec.window is not None and self.first is not None:
            oldest = jnp.min(q_pos) - spec.window + 1 - self.first
            start = jnp.maximum(oldest, 0) // block

        def body(i, partial):
            # The last block starts earlier where the slots are no multiple, and masks what it
            # shares with the one before.
            first = jnp.minimum(i * block, size - block)
            new = (jnp.arange(size) >= i * block) & self.ok
            return merge(partial, self._attend(spec, q, mask_fn, first, block, new))

        return jax.lax.fori_loop(start, self._blocks(), body, empty_partial(q))

    @property
    def ends_softmax(self) -> bool:
        return self.backend.layout == "BKSH"

    def output(self, spec: AttentionSpec, q: Array, mask_fn, extra: ExtraKeys) -> Array:
        return self._attend_at_once(spec, q, mask_fn, extra)

    def key_weights(
        self, spec: AttentionSpec, q: Array, q_pos: Array, mask_fn, lse: Array
    ) -> Array:
        size = self.capacity

        def weights_of(first, block):
            keys = decode(self.keys.span(first, block), self._dtype(q))
            distance, visible = mask_fn(_cut(self.pos, first, block), _cut(self.ok, first, block))
            return key_weights(spec, q, keys, distance, visible, lse, self.backend.layout)

        if self.block is None or size <= self.block:
            return weights_of(0, size)
        block = self.block

        def body(i, attn_weight):
            first = jnp.minimum(i * block, size - block)
            return jax.lax.dynamic_update_slice_in_dim(
                attn_weight, weights_of(first, block), first, axis=3
            )

        attn_weight = jnp.zeros((*q.shape[:2], q.shape[3], size), jnp.float32)
        return jax.lax.fori_loop(0, self._blocks(), body, attn_weight)

    def _attend(self, spec, q, mask_fn, first, size, ok) -> Partial:
        dtype = self._dtype(q)
        keys = decode(self.keys.span(first, size), dtype)
        values = decode(self.values.span(first, size), dtype)
        distance, visible = mask_fn(_cut(self.pos, first, size), _cut(ok, first, size))
        return partial_attention(spec, q, keys, values, distance, visible, self.backend.layout)

    def _attend_at_once(
        self, spec: AttentionSpec, q: Array, mask_fn, extra: ExtraKeys | None = None
    ) -> Any:
        """On a GPU: by the kernel, which unpacks in registers, where it knows the formats."""
        key_form, value_form = self.keys.format, self.values.format
        distance, visible = mask_fn(self.pos, self.ok)
        if all(form.has_kernel(q.shape[-1]) for form in (key_form, value_form)):
            return attend_packed(
                spec, q, self.keys.half, self.values.half, distance, visible, self.stop, extra,
                key_bits=key_form.bits, value_bits=value_form.bits, backend=self.backend,
            )  # fmt: skip
        if self.backend.implementation in ("triton", "interpret"):
            raise ValueError(
                "the kernels read 2-, 4- and 8-bit keys per channel and values per token in groups "
                f"of 16 to 128, got {key_form} and {value_form}; without `implementation` they are "
                "read by XLA"
            )
        packed = self.keys, self.values
        k, v = (decode(x.span(0, self.capacity), q.dtype.name) for x in packed)
        state = partial_attention(spec, q, k, v, distance, visible, self.backend.layout)
        return state if extra is None else attended(state, extra, q.dtype)

    def _dtype(self, q: Array) -> str:
        """Of unpacked numbers: XLA CPU has no bfloat16 arithmetic and would convert twice."""
        return "float32" if self.backend.layout == "BKHS" else q.dtype.name

    def _blocks(self) -> Array:
        assert self.block is not None
        return (self.stop + self.block - 1) // self.block


def _cut(x: Array, first, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, first, size, axis=2)
