"""Drafters: what grows a tree of guesses in front of the target.

A drafter is static (hashable, closed over by the compiled step); its state is a pytree inside the
loop. `propose` reads and never writes, `commit` keeps what the target accepted.

Letters: N nodes with the root; L levels; A accepted tokens at most (= L).
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import jax
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

NO_TOKEN = 2**31 - 1  # a place of a support that is not used

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
        params: Params | None,
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
        params: Params | None,
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

    def propose(self, params, topology, sampler, keys, state: ModelState, root, seen):
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

    def commit(self, params, topology, state, drafted, proposal, path, emitted, count, hidden):
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


def _support_of_children(topology: Topology, tokens: Array) -> tuple[Array, Array]:
    """`ids` and `picks` of a proposal whose children are what they are: the support of a node are
    its children's tokens, each once."""
    parents = pass_order(topology)
    order = np.arange(topology.branching)
    children = np.minimum(topology.first_child[parents][:, None] + order, topology.nodes - 1)
    exists = jnp.asarray(order < topology.child_count[parents][:, None])
    ids = jnp.where(exists, tokens[:, children], NO_TOKEN)
    same = ids[..., :, None] == ids[..., None, :]  # [B, I, C, C]
    first = jnp.argmax(same, axis=-1)  # the place of the first child with the same token
    ids = jnp.where(first == order, ids, NO_TOKEN)
    row = np.searchsorted(parents, np.maximum(topology.parent, 0))
    row = np.minimum(row, len(parents) - 1)
    return ids, first[:, row, topology.rank].astype(jnp.int32)


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


class LookupState(NamedTuple):
    history: Leaf  # i32[B, H], the text with the root
    length: Leaf  # i32[B], its tokens


@dataclass(frozen=True, kw_only=True)
class LookupDrafter:
    """Prompt lookup: the tokens that followed the text's last tokens when these came before.

    No model. The longest match of up to `longest` tokens wins, of equals the latest; chain i of the
    tree follows the i-th best match. A text that ends where it repeats itself is continued
    periodically. Without a match the guesses are worthless but harmless.
    """

    longest: int = 4

    @property
    def rule(self) -> Rule:
        return "point"

    def check(self, topology: Topology) -> None:
        if (topology.child_count[1:] > 1).any():
            raise ValueError(
                f"prompt lookup continues chains and cannot fill this tree ({topology}); choose "
                "Topology.chain(n) or Topology.k_chains(k, n)"
            )

    def propose(self, params, topology, sampler, keys, state: LookupState, root, seen):
        history, length = state
        batch, room = history.shape
        place = jnp.arange(room)
        end = length - 1  # of the root
        same = jnp.zeros((batch, room), jnp.int32)
        going = place < end[:, None]
        for back in range(self.longest):
            wanted = jnp.take_along_axis(history, jnp.maximum(end - back, 0)[:, None], axis=1)
            earlier = jnp.roll(history, back, axis=1)
            going = going & (earlier == wanted) & (place >= back) & (end[:, None] >= back)
            same = same + going
        chains = max(int(topology.child_count[0]), 1)
        score = jnp.where(same > 0, same * room + place, -1)
        _, start = jax.lax.top_k(score, min(chains, room))
        node = np.arange(topology.nodes)
        chain = np.zeros(topology.nodes, np.int32)  # the child of the root above each node
        for child in range(1, topology.nodes):
            parent = topology.parent[child]
            chain[child] = topology.rank[child] if parent == 0 else chain[parent]
        begin = start[:, np.minimum(chain, start.shape[1] - 1)]
        period = jnp.maximum(end[:, None] - begin, 1)
        index = begin + 1 + (jnp.asarray(topology.depth) - 1) % period
        tokens = jnp.take_along_axis(history, jnp.minimum(index, room - 1), axis=1)
        tokens = jnp.where(node == 0, root[:, None], tokens)
        ids, picks = _support_of_children(topology, tokens)
        return Proposal(tokens, picks, ids, jnp.zeros(ids.shape, jnp.float32)), None

    def commit(self, params, topology, state, drafted, proposal, path, emitted, count, hidden):
        history, length = state
        rows, order = jnp.arange(history.shape[0])[:, None], jnp.arange(emitted.shape[1])
        index = jnp.where(order < count[:, None], length[:, None] + order, history.shape[1])
        history = history.at[rows, index].set(emitted, mode="drop")
        return LookupState(history, length + count)
