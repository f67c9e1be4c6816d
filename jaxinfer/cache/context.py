"""Where the tokens of one call stand: for a read, for a commit, and for a tier that takes them."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxinfer.runtime.backend import Backend
from jaxinfer.typing import Leaf


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class StepContext:
    """Where the fresh tokens of one call stand.

    Fresh token i of row b has position `length[b] + offset[b, i]`. In a chain `offset` counts up
    and `visible`, `parent` and `levels` are None (token i sees tokens j <= i). In a tree `offset`
    is the depth and `visible` the ancestors-or-self. A tree that grows level by level reads its new
    nodes behind the P that earlier calls added and nobody has committed: `pending` are those of the
    layer, as its mixer's `read` returned them, and `visible` is bool[B|1, T, P + T].

    A mixer that steps from state to state goes by `parent` instead: the place of each node's
    parent among the pending and fresh tokens, or -1 behind the committed text. Nodes
    `levels[i]:levels[i + 1]` of the fresh ones are equally deep and have their parents before them.

    `reads` is False when every row is empty, so that stored segments need not be read at all.
    `is_prompt` says that the tokens are given, not generated. `backend` is that of the cache
    (`Cache`), by which a mixer multiplies. `sites` are the inputs of all blocks so far, the last
    that of the mixer (`jaxinfer.models.stack.blocks`).
    """

    length: Leaf  # i32[B], committed tokens
    offset: Leaf  # i32[B, T]
    valid: Leaf  # bool[B, T]
    visible: Leaf = None  # bool[B|1, T, T] or None
    parent: Leaf = None  # i32[B|1, T] or None
    pending: Leaf = None  # what `read` returned for the layer's pending tokens, or None
    sites: tuple[Leaf, ...] = ()  # float[B, T, D] each
    levels: tuple[int, ...] | None = field(default=None, metadata={"static": True})
    is_tree: bool = field(default=False, metadata={"static": True})
    is_prompt: bool = field(default=False, metadata={"static": True})
    reads: bool = field(default=True, metadata={"static": True})
    backend: Backend | None = field(default=None, metadata={"static": True})

    @property
    def positions(self) -> Int[Array, "B T"]:
        return self.length[:, None] + self.offset


def chain_context(
    length: Array, count: Array, size: int, *, reads: bool = True, is_prompt: bool = False
) -> StepContext:
    """The context of `size` consecutive tokens of which row b uses the first `count[b]`."""
    offset = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), (length.shape[0], size))
    return StepContext(
        length=length, offset=offset, valid=offset < count[:, None], reads=reads,
        is_prompt=is_prompt,
    )  # fmt: skip


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class CommitContext:
    """Which fresh tokens of a call are committed: `accepted[b, :count[b]]`, behind `length[b]`.

    `after` is any array computed from the call's reads; writes depend on it (`write_index`).
    """

    length: Leaf  # i32[B], committed tokens before
    accepted: Leaf  # i32[B, A] in sequence order, or None: the first ones
    count: Leaf  # i32[B]
    after: Leaf
    is_prompt: bool = field(default=False, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PushContext:
    """What a tier is told about the items that enter it.

    `n_in` counts the tokens that entered the tier before, a closed form of the row's length, and
    `count` those of the items that enter now, the first ones. `stored_weights` are the
    probabilities f32[B, K, S] that the queries of this call gave to the keys of each of the tier's
    segments, and the items carry those of the fresh keys, if the policy asks for them
    (`Policy.weigh_keys`). With `spills=False` nobody takes what leaves the tier: it need not read
    that, and may return None.
    """

    n_in: Leaf  # i32[B]
    count: Leaf  # i32[B]
    after: Leaf  # see `write_index`
    length: Leaf  # i32[B], tokens that the row had committed before
    stored_weights: tuple[Leaf, ...] = ()
    is_prompt: bool = field(default=False, metadata={"static": True})
    spills: bool = field(default=True, metadata={"static": True})
