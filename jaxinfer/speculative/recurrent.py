"""Drafting with a recurrent cell (`jaxinfer.models.recurrent`), level by level down the tree."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxinfer.decode.sampling import SamplerRows
from jaxinfer.models.recurrent import guesses, read
from jaxinfer.speculative.drafters import METHODS, Method, pass_order
from jaxinfer.speculative.grow import check_branching, grow_tree
from jaxinfer.speculative.proposal import Proposal
from jaxinfer.speculative.topology import Topology
from jaxinfer.speculative.verify import Rule
from jaxinfer.typing import Leaf, Params


@dataclass(frozen=True, kw_only=True)
class RecurrentDrafter:
    """Grows trees with a cell. Its state is f32[B, D], the target's hidden state that chose the
    root; zeros before the first step, whose guesses know the root alone."""

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
        state: Array,
        root: Array,
        seen: Array,
    ) -> tuple[Proposal, Leaf]:
        order, states = pass_order(topology), state[:, None]  # of the token before the root, first

        def logits(level: int, nodes: np.ndarray, tokens: Array) -> Array:
            nonlocal states
            above = np.asarray(topology.parent)[nodes]
            place = 1 + np.searchsorted(order, above) if level > 0 else np.zeros(1, np.int32)
            fresh = read(params, states[:, place], tokens[:, nodes])
            states = jnp.concatenate([states, fresh], axis=1)
            return guesses(params, fresh)

        proposal = grow_tree(
            topology, sampler, keys, root, seen, logits, draws=METHODS[self.method][0],
            size=self.size, vocabulary=params["draft_vocabulary"],
        )  # fmt: skip
        return proposal, None

    def commit(
        self,
        params: Params,
        topology: Topology,
        state: Array,
        drafted: Leaf,
        proposal: Proposal,
        path: Array,
        emitted: Array,
        count: Array,
        hidden: Array,
    ) -> Array:
        end = jnp.maximum(count - 1, 0)[:, None]
        nodes = jnp.take_along_axis(path, end, axis=1)
        last = jnp.take_along_axis(hidden, nodes[..., None], axis=1)[:, 0].astype(state.dtype)
        return jnp.where((count > 0)[:, None], last, state)
