"""The cache protocol: read, merge, commit.

A forward pass *reads*: attention merges the partial softmax states of every `Segment` that a
layer's tiers store with that of the call's fresh tokens, and returns those as `Items`. Nothing is
written. `commit` then *pushes* the accepted fresh tokens into the first tier; what a tier evicts
it spills into the next. Prefill, chunked prefill, decode, tree verification and training are one
code path with another `StepContext`. A tier sees one layer; the cache is a tuple of per-layer
states.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxinfer.cache.context import PushContext
from jaxinfer.config import ModelConfig
from jaxinfer.ops.attention import Partial
from jaxinfer.runtime.backend import Backend
from jaxinfer.typing import Leaf, Params
from pallas_kernels.ordering import write_index as write_index
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
class Items:
    """Tokens on their way into a tier; keys in the form the policy stores (rotated or raw).

    A tier that makes keys and values itself (`jaxinfer.models.deferred`) may get none, but the
    layer's inputs.
    """

    k: Leaf  # [B, K, A, H]
    v: Leaf  # [B, K, A, H]
    pos: Leaf  # i32[B, K|1, A] absolute
    attn_weight: Leaf = None  # f32[B, K, A] probability received so far, or None; see `attend`
    x: Leaf = None  # [B, 1, A, D] the layer's inputs, or None


@runtime_checkable
class Segment(Protocol):
    """Stored tokens that queries can attend to.

    `query_phase` names the rotation of the queries that its keys expect. `partial` and
    `key_weights` take `mask_fn(k_pos, ok) -> (distance, visible)` of `jaxinfer.cache.fresh`.
    `holds_tokens` is False for a summary of tokens that are gone: it takes part in the softmax but
    receives no attention weight. Where it `ends_softmax`, `output` is the attention over its tokens
    and the extra keys, in the dtype of `q`, by one kernel. `capacity`: the tokens that it has slots
    for; `pos` i32[B|1, K|1, capacity]: the positions of what they hold, None in a summary.
    """

    @property
    def capacity(self) -> int: ...

    @property
    def pos(self) -> Leaf: ...

    @property
    def query_phase(self) -> QueryPhase: ...

    @property
    def holds_tokens(self) -> bool: ...

    @property
    def ends_softmax(self) -> bool: ...

    def partial(self, spec, q: Array, q_pos: Array, mask_fn: Callable) -> Partial: ...

    def output(self, spec, q: Array, mask_fn: Callable, extra: ExtraKeys) -> Array: ...

    def key_weights(self, spec, q: Array, q_pos: Array, mask_fn: Callable, lse: Array) -> Array: ...


class Tier:
    """One place where tokens of a layer are kept; its state is a pytree.

    A tier is a frozen dataclass, hashable and without arrays. `n_in` i32[B] is how many tokens have
    entered it: a closed form of the row's length, so that tiers store no counters and rows are
    ragged for free. Required are `init`, `segments`, `push` and `bytes_per_row`.
    """

    @property
    def grows(self) -> bool:
        """Whether the memory depends on the number of tokens."""
        return False

    @property
    def truncates(self) -> bool:
        """Whether a row is cut to its first tokens by setting its length: what later tokens wrote
        is not read then, and changed nothing before them."""
        return False

    def sized(self, context: int) -> "Tier":
        """The tier with room for budgets that are shares of at most `context` tokens."""
        return self

    def check(self, cfg: ModelConfig, geometry: Geometry) -> None:
        """Refuses, with the remedy, a model that the tier cannot serve."""

    def room(self, capacity: int, prompt: int) -> int | None:
        """The most tokens that it can take behind a prompt, in a cache for `capacity` tokens.

        None stands for any number: what does not fit is evicted, as the method wants it. A host
        refuses a generation that needs more, as a compiled step would drop them in silence.
        """
        return capacity - prompt if self.grows else None

    def init(self, geometry: Geometry, batch: int) -> Leaf:
        """The empty state."""
        raise NotImplementedError

    def passed(self, n_in: Array) -> Array:
        """How many of the `n_in` tokens have gone on to the next tier."""
        return jnp.zeros_like(n_in)

    def passed_by(self, state: Leaf, n_in: Array) -> Array:
        """`passed` for the rows of a state, which may have budgets of their own."""
        return self.passed(n_in)

    def budgeted(self, state: Leaf, contexts: Sequence[int]) -> Leaf:
        """An empty state whose rows take budgets that are shares of `contexts[b]` tokens; one
        without shares returns it as it is."""
        return state

    def segments(self, state: Leaf, aux: Params | None, n_in: Array) -> tuple[Segment, ...]:
        """What queries attend to."""
        raise NotImplementedError

    def push(
        self, state: Leaf, aux: Params | None, items: Items, ctx: PushContext
    ) -> tuple[Leaf, Items | None, Array]:
        """Takes the first `ctx.count[b]` items of each row; returns (state, spilled,
        spilled_count).

        Writes must come after every read of the state: see `write_index`.
        """
        raise NotImplementedError

    def grow(self, state: Leaf, capacity: int) -> Leaf:
        """The state with room for `capacity` tokens; a tier of fixed size returns it as it is."""
        return state

    def bytes_per_row(self, geometry: Geometry) -> int:
        """Bytes of the state of one row."""
        raise NotImplementedError


def bytes_of(tree: Leaf) -> int:
    """Bytes of every array leaf (also of `jax.ShapeDtypeStruct` leaves)."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
