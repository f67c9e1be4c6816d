"""Keys and values stored behind a Hadamard rotation of their channels (QuaRot, arXiv 2404.00456,
section 4.3).

An orthonormal matrix Q leaves scores as they are, (q Q)(k Q)^T = q k^T, and is undone in the
output, (p V Q) Q^T = p V, while it spreads what one channel holds over all of them: a channel of
outliers no longer stretches the range of a group that spans channels. Q is Sylvester's Hadamard
matrix over sqrt(H), so that the head size H must be a power of two. Bytes are those of the tier
inside.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from scipy.linalg import hadamard

from jaxinfer.cache.base import Geometry, Items, QueryPhase, Segment, Tier
from jaxinfer.cache.context import PushContext
from jaxinfer.config import ModelConfig
from jaxinfer.ops.attention import AttentionSpec, Partial
from jaxinfer.typing import Leaf, Params
from pallas_kernels.softmax_state import ExtraKeys


@functools.cache
def _matrix(size: int) -> np.ndarray:
    return hadamard(size).astype(np.float32) / np.float32(size**0.5)


def rotated(x: Array) -> Array:
    """`x` [..., H] times Q, in its dtype. Q is symmetric, so that twice is the identity."""
    return jnp.matmul(x, _matrix(x.shape[-1]), preferred_element_type=jnp.float32).astype(x.dtype)


@dataclass(frozen=True, kw_only=True)
class RotatedSegment:
    """A segment whose keys and values are rotated; queries come and outputs leave unrotated."""

    inner: Segment

    @property
    def capacity(self) -> int:
        return self.inner.capacity

    @property
    def pos(self) -> Leaf:
        return self.inner.pos

    @property
    def query_phase(self) -> QueryPhase:
        return self.inner.query_phase

    @property
    def holds_tokens(self) -> bool:
        return self.inner.holds_tokens

    @property
    def ends_softmax(self) -> bool:
        return False  # the kernel's extra values are not rotated

    def partial(self, spec: AttentionSpec, q: Array, q_pos: Array, mask_fn: Callable) -> Partial:
        found = self.inner.partial(spec, rotated(q), q_pos, mask_fn)
        return found._replace(acc=rotated(found.acc))

    def output(self, spec: AttentionSpec, q: Array, mask_fn: Callable, extra: ExtraKeys) -> Array:
        raise NotImplementedError("a rotated segment does not end the softmax")

    def key_weights(
        self, spec: AttentionSpec, q: Array, q_pos: Array, mask_fn: Callable, lse: Array
    ) -> Array:
        return self.inner.key_weights(spec, rotated(q), q_pos, mask_fn, lse)


@dataclass(frozen=True, kw_only=True)
class Rotated(Tier):
    """The tier `inner`, which is given rotated keys and values."""

    inner: Tier

    @property
    def grows(self) -> bool:
        return self.inner.grows

    def sized(self, context: int) -> "Rotated":
        return replace(self, inner=self.inner.sized(context))

    def check(self, cfg: ModelConfig, geometry: Geometry) -> None:
        size = geometry.head_dim
        if size & (size - 1):
            raise ValueError(
                f"rotation 'hadamard' needs a head size that is a power of two, got {size}; "
                "leave rotation away"
            )
        self.inner.check(cfg, geometry)

    def room(self, capacity: int, prompt: int) -> int | None:
        return self.inner.room(capacity, prompt)

    def init(self, geometry: Geometry, batch: int) -> Leaf:
        return self.inner.init(geometry, batch)

    def passed(self, n_in: Array) -> Array:
        return self.inner.passed(n_in)

    def segments(self, state: Leaf, aux: Params | None, n_in: Array) -> tuple[Segment, ...]:
        inner = self.inner.segments(state, aux, n_in)
        return tuple(RotatedSegment(inner=segment) for segment in inner)

    def push(
        self, state: Leaf, aux: Params | None, items: Items, ctx: PushContext
    ) -> tuple[Leaf, Items | None, Array]:
        state, spilled, count = self.inner.push(state, aux, _turned(items), ctx)
        return state, None if spilled is None else _turned(spilled), count

    def grow(self, state: Leaf, capacity: int) -> Leaf:
        return self.inner.grow(state, capacity)

    def bytes_per_row(self, geometry: Geometry) -> int:
        return self.inner.bytes_per_row(geometry)


def _turned(items: Items) -> Items:
    return replace(items, k=rotated(items.k), v=rotated(items.v))
