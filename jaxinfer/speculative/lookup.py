"""Prompt lookup (arXiv 2304.04487): drafting without a model, by what the text said before.

Letters: N nodes with the root; I nodes that have children; C children of a node at most.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxinfer.decode.sampling import SamplerRows
from jaxinfer.speculative.drafters import pass_order
from jaxinfer.speculative.proposal import Proposal
from jaxinfer.speculative.topology import Topology
from jaxinfer.speculative.verify import Rule
from jaxinfer.typing import Leaf, Params

NO_TOKEN = 2**31 - 1  # a place of a support that is not used


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

    def propose(
        self,
        params: Params,
        topology: Topology,
        sampler: SamplerRows,
        keys: Array,
        state: LookupState,
        root: Array,
        seen: Array,
    ) -> tuple[Proposal, Leaf]:
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

    def commit(
        self,
        params: Params,
        topology: Topology,
        state: LookupState,
        drafted: Leaf,
        proposal: Proposal,
        path: Array,
        emitted: Array,
        count: Array,
        hidden: Array,
    ) -> LookupState:
        history, length = state
        rows, order = jnp.arange(history.shape[0])[:, None], jnp.arange(emitted.shape[1])
        index = jnp.where(order < count[:, None], length[:, None] + order, history.shape[1])
        history = history.at[rows, index].set(emitted, mode="drop")
        return LookupState(history, length + count)


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
