"""The cache protocol: read, merge, commit.

A forward pass *reads*: attention merges the partial softmax states of every `Segment` that a
layer's tiers store with that of the call's fresh tokens, and returns those as `Items`. Nothing is
written. `commit` then *pushes* the accepted fresh tokens into the first tier; what a tier evicts
it spills into the next. Prefill, chunked prefill, decode, tree verification and training are one
code path with another `StepContext`. A tier sees one layer; the cache is a tuple of per-layer
states.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxinfer.config import ModelConfig
from jaxinfer.ops.attention import Partial
from jaxinfer.runtime.backend import Backend
from jaxinfer.typing import Leaf, Params
from pallas_kernels.softmax_state import ExtraKeys

QueryPhase = Literal["absolute", "in_cache"]


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Shape and layout of one layer's cache; static.

    `capacity` is the most tokens a row may ever hold.
    """

    num_kv_heads: int
    head_dim: int
    capacity: int
    dtype: str = "float32"
    backend: Backend = Backend()


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class StepContext:
    """Where the fresh tokens of one call stand.

    Fresh token i of row b has position `length[b] + offset[b, i]`. In a chain `offset` counts up
    and `visible` is None (token i sees tokens j <= i). In a tree `offset` is the depth, `visible`
    the ancestors-or-self and `parent` the index of each node's parent (for recurrent mixers). A
    tree that grows level by level reads its new nodes behind the P that earlier calls added and
    nobody has committed: `pending` are those of the layer, `visible` is bool[B|1, T, P + T].
    `reads` is False when every row is empty, so that stored segments need not be read at all.
    `backend` is that of the cache (`Cache`), by which a mixer multiplies.
    """

    length: Leaf  # i32[B], committed tokens
    offset: Leaf  # i32[B, T]
    valid: Leaf  # bool[B, T]
    visible: Leaf = None  # bool[B|1, T, T] or None
    parent: Leaf = None  # i32[B, T] or None
    pending: Leaf = None  # Items of one layer, or None
    is_tree: bool = field(default=False, metadata={"static": True})
    reads: bool = field(default=True, metadata={"static": True})
    backend: Backend | None = field(default=None, metadata={"static": True})

    @property
    def positions(self) -> Int[Array, "B T"]:
        return self.length[:, None] + self.offset

    def fresh_visible(self) -> Bool[Array, "_ T T"]:
        """Which fresh key (last axis) each fresh query may see, before `Policy.admit`."""
        size = self.offset.shape[1]
        causal = jnp.tril(jnp.ones((1, size, size), bool)) if self.visible is None else self.visible
        return causal & self.valid[:, None, :]


def chain_context(length: Array, count: Array, size: int, *, reads: bool = True) -> StepContext:
    """The context of `size` consecutive tokens of which row b uses the first `count[b]`."""
    offset = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), (length.shape[0], size))
    return StepContext(length=length, offset=offset, valid=offset < count[:, None], reads=reads)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Items:
    """Tokens on their way into a tier; keys in the form the policy stores (rotated or raw)."""

    k: Leaf  # [B, K, A, H]
    v: Leaf  # [B, K, A, H]
    pos: Leaf  # i32[B, K|1, A] absolute
    attn_weight: Leaf = None  # f32[B, K, A] probability received so far, or None; see `attend`


@runtime_checkable
class Segment(Protocol):
    """Stored tokens that queries can attend to.

    `query_phase` names the rotation of the queries that its keys expect. `partial` and
    `key_weights` take `mask_fn(k_pos, ok) -> (distance, visible)` of `jaxinfer.cache.fresh`.
    `holds_tokens` is False for a summary of tokens that are gone: it takes part in the softmax but
    receives no attention weight. Where it `ends_softmax`, `output` is the attention over its tokens
    and the extra keys, in the dtype of `q`, by one kernel. `capacity`: the tokens that it has slots
    for.
    """

    @property
    def capacity(self) -> int: ...

    @property
    def query_phase(self) -> QueryPhase: ...

    @property
    def holds_tokens(self) -> bool: ...

    @property
    def ends_softmax(self) -> bool: ...

    def partial(self, spec, q: Array, q_pos: Array, mask_fn: Callable) -> Partial: ...

    def output(self, spec, q: Array, mask_fn: Callable, extra: ExtraKeys) -> Array: ...

    def key_weights(self, spec, q: Array, q_pos: Array, mask_fn: Callable, lse: Array) -> Array: ...


@runtime_checkable
class Tier(Protocol):
    """One place where tokens of a layer are kept; frozen and hashable, its state is a pytree.

    `n_in` i32[B] is how many tokens have entered this tier: a closed form of the row's length, so
    tiers store no counters and rows are ragged for free. `grows` is False when the memory does not
    depend on the number of tokens.
    """

    @property
    def grows(self) -> bool: ...

    def sized(self, context: int) -> "Tier":
        """The tier with budgets given as shares turned into tokens of `context`."""
        ...

    def check(self, cfg: ModelConfig, geometry: Geometry) -> None:
        """Refuses, with the remedy, a model that the tier cannot serve."""
        ...

    def init(self, geometry: Geometry, batch: int) -> Leaf: ...

    def kept(self, n_in: Array) -> Array: ...

    def passed(self, n_in: Array) -> Array: ...

    def segments(self, state: Leaf, aux: Params | None, n_in: Array) -> tuple[Segment, ...]: ...

    def observe(self, state: Leaf, attn_weights: tuple[Array, ...]) -> Leaf:
        """The state after each segment's keys received so much probability, f32[B, K, S]."""
        ...

    def push(
        self, state: Leaf, aux: Params | None, items: Items, n_in: Array, count: Array,
        after: Array, spills: bool = True,
    ) -> tuple[Leaf, Items | None, Array]:  # fmt: skip
        """Takes the first `count[b]` items of each row; returns (state, spilled, spilled_count).

        Writes must come after every read of the state: see `write_index`. Nobody takes what is
        spilled if `spills` is False: a tier need not read it, and may return None.
        """
        ...

    def grow(self, state: Leaf, capacity: int) -> Leaf:
        """The state with room for `capacity` tokens; a tier of fixed size returns it as it is."""
        ...

    def bytes_per_row(self, geometry: Geometry) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Which tiers a cache has and how positions are chosen; static, compared by value.

    `window` (with `sinks`) is the Lambda rule: a query sees the first `sinks` tokens and the
    `window` tokens before itself. With positions "in_cache" the distance to a sink never exceeds
    `sinks + window` (arXiv 2309.17453, section 3.2). `chunk_invariant`: prefill in chunks of any
    size gives the same result. `lossless_under_tree`: committing several tokens at once equals
    committing them one by one. Tests hold a policy to both. `kernels` are learned parameters of
    tiers (`LessKernels`); they reach the tiers as `aux` and are no part of the policy's identity.
    """

    name: str
    tiers: tuple[Tier, ...] = ()
    positions: QueryPhase = "absolute"
    sinks: int = 0
    window: int | None = None
    observe: bool = False  # wants the attention weights of every step
    commit_first: bool = False  # a lone token attends to the state after its own push (reference)
    chunk_invariant: bool = True
    lossless_under_tree: bool = True
    kernels: Any = field(default=None, compare=False, repr=False)
    piece: int | None = None  # the most tokens of a prompt that are read at once

    @property
    def fixed_size(self) -> bool:
        """Whether the memory of a row does not depend on its tokens."""
        return bool(self.tiers) and not any(tier.grows for tier in self.tiers)

    @property
    def endless(self) -> bool:
        """Whether a text may go on for ever: neither memory nor positions grow with it."""
        return self.fixed_size and self.positions == "in_cache"

    @property
    def reach(self) -> int | None:
        """Positions that a query and all it attends to span at most; None if that grows."""
        if not self.endless or self.window is None:
            return None
        return self.sinks + self.window + 1

    def warn_beyond(self, most: int, stacklevel: int = 2) -> None:
        """Warns if an endless policy spans more than the `most` positions of a model's training."""
        if self.reach is not None and self.reach > most:
            warnings.warn(
                f"policy {self.name!r} spans {self.reach} positions (sinks + window + 1), which "
                f"exceed the {most} positions that the model was trained on; take a smaller window",
                stacklevel=stacklevel + 1,
            )

    def layer_policies(self, layers: int) -> "tuple[Policy, ...]":
        """The policy of each layer."""
        return (self,) * layers

    def sized(self, context: int) -> "Policy":
        """The policy with budgets given as shares turned into tokens of `context`."""
        return replace(self, tiers=tuple(tier.sized(context) for tier in self.tiers))

    def check(self, cfg: ModelConfig, geometry: Geometry) -> None:
        """Refuses, with the remedy, a model that the policy cannot serve."""
        if self.positions == "in_cache" and cfg.positions == "learned":
            raise ValueError(
                f"policy {self.name!r} counts positions inside the cache, but {cfg.family} adds "
                "learned positions to the embeddings; choose full, kivi or h2o"
            )
        if self.kernels is not None:
            self.kernels.check(cfg)
        for tier in self.tiers:
            tier.check(cfg, geometry)

    def admit(self, q_pos: Array, k_pos: Array) -> Array | bool:
        """Visibility by absolute position beyond causality."""
        if self.window is None:
            return True
        return (k_pos < self.sinks) | (q_pos - k_pos <= self.window)

    def horizon(self, length: Array) -> Array | None:
        """Tokens that may be committed at once before plain decoding would have seen a changed
        state; None without such a limit."""
        return None

    def in_cache_positions(self, positions: Array) -> Array:
        """Positions of queries of the "in_cache" phase, for keys in front of the window."""
        if self.window is None:
            return positions
        return jnp.minimum(positions, self.sinks + self.window)


@dataclass(frozen=True, kw_only=True)
class PerLayer(Policy):
    """Another policy for every layer; made by `jaxinfer.cache.presets.per_layer`."""

    layers: tuple[Policy, ...] = ()

    @property
    def fixed_size(self) -> bool:
        return all(policy.fixed_size for policy in self.layers)

    @property
    def endless(self) -> bool:
        return all(policy.endless for policy in self.layers)

    @property
    def reach(self) -> int | None:
        spans = [policy.reach for policy in self.layers]
        return None if None in spans else max(span for span in spans if span is not None)

    def layer_policies(self, layers: int) -> tuple[Policy, ...]:
        if len(self.layers) != layers:
            raise ValueError(
                f"got {len(self.layers)} policies for {layers} layers; give one or one each"
            )
        return self.layers

    def sized(self, context: int) -> "PerLayer":
        return replace(self, layers=tuple(policy.sized(context) for policy in self.layers))

    def horizon(self, length: Array) -> Array | None:
        limits = [policy.horizon(length) for policy in self.layers]
        finite = [limit for limit in limits if limit is not None]
        return functools.reduce(jnp.minimum, finite) if finite else None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Cache:
    """All rows' committed tokens. `layers[i]` is layer i's mixer state. `pending` are the fresh
    tokens, per layer, of earlier calls that the next one sees too (see `StepContext`).
    `backend` is that of the layers and of what they compute beside attention; None, without stored
    tokens, leaves all to XLA, which can be differentiated."""

    length: Leaf  # i32[B]
    layers: tuple[Leaf, ...]
    shared: Leaf = None  # what all layers share, such as a page table
    pending: tuple[Leaf, ...] = ()
    policies: tuple[Policy, ...] = field(default=(), metadata={"static": True})
    backend: Backend | None = field(default=None, metadata={"static": True})


def write_index(index: Array, capacity: int, *after: Array | None) -> Array:
    """`index` (at most `capacity`, which means "drop"), made to depend on every array of `after`.

    XLA writes a buffer in place only if it can prove that all reads come first; a data dependency
    on something computed from the reads proves it. `after` are such things: integers that are never
    negative (sampled tokens), or floats. The value is unchanged, also when one is NaN.
    """
    for one in after:
        if one is not None:
            integer = jnp.issubdtype(one.dtype, jnp.integer)
            unknown = jnp.any(one < 0) if integer else jnp.any(one != one)
            index = jnp.minimum(index, capacity + unknown.astype(index.dtype))
    return index


def bytes_of(tree: Leaf) -> int:
    """Bytes of every array leaf (also of `jax.ShapeDtypeStruct` leaves)."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
