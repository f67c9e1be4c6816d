"""Drafters: what grows a tree of guesses in front of the target.

A drafter is static (hashable, closed over by the compiled step); its state is a pytree inside the
loop. `propose` reads and never writes, `commit` keeps what the target accepted.

Letters: N nodes with the root; L levels; A accepted tokens at most (= L).
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxinfer.cache.context import StepContext, chain_context
from jaxinfer.cache.policy import Cache
from jaxinfer.config import ModelConfig
from jaxinfer.decode.sampling import SamplerRows
from jaxinfer.models.stack import commit, forward
from jaxinfer.runtime.layout import row_major
from jaxinfer.speculative.grow import check_branching, grow_tree
from jaxinfer.speculative.growth import growth
from jaxinfer.speculative.proposal import Draws, Proposal
from jaxinfer.speculative.topology import Topology
from jaxinfer.speculative.verify import Rule
from jaxinfer.typing import Leaf, Params

Method = Literal["sequoia", "specinfer", "top-k", "naive"]

# How children are drawn from a model's distribution, and how they are verified.
METHODS: dict[Method, tuple[Draws, Rule]] = {
    "sequoia": ("without_replacement", "without_replacement"),  # arXiv 2402.12374
    "specinfer": ("with_replacement", "with_replacement"),  # arXiv 2305.09781
    "top-k": ("top", "point"),
    "naive": ("with_replacement", "point"),
}


@runtime_checkable
class Drafter(Protocol):
    @property
    def rule(self) -> Rule:
        """How its proposals are verified."""
        ...

    def check(self, topology: Topology) -> None:
        """Refuses a tree that it cannot fill."""
        ...

    def propose(
        self,
        params: Params,
        topology: Topology,
        sampler: SamplerRows,
        keys: Array,
        state: Leaf,
        root: Array,
        seen: Array,
    ) -> tuple[Proposal, Leaf]:
        """The tree behind the token `root` i32[B], and what `commit` needs of it."""
        ...

    def commit(
        self,
        params: Params,
        topology: Topology,
        state: Leaf,
        drafted: Leaf,
        proposal: Proposal,
        path: Array,
        emitted: Array,
        count: Array,
        hidden: Array,
    ) -> Leaf:
        """The state after `emitted[b, :count[b]]`, whose nodes are `path` shifted by one; `hidden`
        [B, N, D] are the target's states behind the nodes."""
        ...


class ModelState(NamedTuple):
    """A draft model's cache holds every committed token but the last one, which is `previous`: the
    last token of an accepted path may be a leaf, which no draft pass has read."""

    cache: Cache
    previous: Leaf  # i32[B]


@dataclass(frozen=True, kw_only=True)
class ModelDrafter:
    """A smaller model, an early exit of the target, or the target under a cheaper policy.

    `size`: tokens of the support (M). Draft passes per step: L - 1, since leaves need none.
    """

    cfg: ModelConfig
    size: int = 64
    method: Method = "sequoia"

    @property
    def rule(self) -> Rule:
        return METHODS[self.method][1]

    def check(self, topology: Topology) -> None:
        check_branching(topology, self.size)

    def propose(
        self,
        params: Params,
        topology: Topology,
        sampler: SamplerRows,
        keys: Array,
        state: ModelState,
        root: Array,
        seen: Array,
    ) -> tuple[Proposal, Leaf]:
        cache = state.cache
        known = jnp.stack([state.previous, root], axis=1)
        ctx = chain_context(cache.length, jnp.full((len(root),), 2, jnp.int32), 2)
        out = forward(self.cfg, params, self._readable(known), cache, ctx, logits="last")

        def read(level: int, nodes: np.ndarray, tokens: Array) -> Array:
            nonlocal out
            if level > 0:
                ctx = level_context(topology, level, cache.length)
                behind = replace(cache, pending=out.fresh)
                out = forward(self.cfg, params, self._readable(tokens[:, nodes]), behind, ctx)
            return out.logits

        proposal = grow_tree(
            topology, sampler, keys, root, seen, read, draws=METHODS[self.method][0],
            size=self.size, vocabulary=params.get("draft_vocabulary"),
        )  # fmt: skip
        return proposal, out.fresh

    def commit(
        self,
        params: Params,
        topology: Topology,
        state: ModelState,
        drafted: Leaf,
        proposal: Proposal,
        path: Array,
        emitted: Array,
        count: Array,
        hidden: Array,
    ) -> ModelState:
        place = np.zeros(topology.nodes, np.int32)
        order = pass_order(topology)
        place[order] = 1 + np.arange(len(order))
        first = jnp.zeros_like(path[:, :1])  # `previous`
        take = jnp.concatenate([first, jnp.asarray(place)[path[:, :-1]]], axis=1)
        cache = commit(self.cfg, params, state.cache, drafted, take, count, proposal.tokens[:, -1])
        # The last token that is committed now: the one before the last that was emitted.
        end = jnp.maximum(count - 1, 0)[:, None]
        nodes = jnp.take_along_axis(path, end, axis=1)
        last = jnp.take_along_axis(proposal.tokens, nodes, axis=1)[:, 0]
        cache = replace(cache, layers=row_major(cache.layers))
        return ModelState(cache, jnp.where(count > 0, last, state.previous))

    def _readable(self, tokens: Array) -> Array:
        """A draft may know fewer tokens than the target; it reads another one for those."""
        return jnp.minimum(tokens, self.cfg.vocab_size - 1)


def pass_order(topology: Topology) -> np.ndarray:
    """The nodes that a draft model reads, in order: those with children."""
    return np.flatnonzero(topology.child_count)


def level_context(topology: Topology, level: int, length: Int[Array, " B"]) -> StepContext:
    """The context of a level's branching nodes behind the draft cache, the token before the root,
    the root and the branching nodes above."""
    nodes = growth(topology)[level].parents
    order = pass_order(topology)
    order = order[order <= nodes[-1]]
    above = 1 + np.searchsorted(order, np.asarray(topology.parent)[nodes])
    visible = topology.ancestors[nodes][:, order]
    visible = np.concatenate([np.ones((len(nodes), 1), bool), visible], axis=1)
    shape = (length.shape[0], len(nodes))
    return StepContext(
        length=length,
        offset=jnp.full(shape, 1 + level, jnp.int32),
        valid=jnp.ones(shape, bool),
        visible=jnp.asarray(visible)[None],
        parent=jnp.asarray(above, jnp.int32)[None],
        levels=(0, len(nodes)),
        is_tree=True,
    )
