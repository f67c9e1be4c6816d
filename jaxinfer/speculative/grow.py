"""Growing a tree of guesses level by level: all children of a level are drawn at once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxinfer.decode.sampling import SamplerRows
from jaxinfer.speculative.growth import growth
from jaxinfer.speculative.proposal import Draws, Proposal, draw_children, support
from jaxinfer.speculative.topology import Topology
from jaxinfer.speculative.verify import seen_at

Read = Callable[[int, np.ndarray, Array], Float[Array, "B W V"]]
"""`read(level, nodes, tokens)`: the draft's logits behind the nodes of a level that have children;
`tokens` i32[B, n] are those of the tree so far."""


def grow_tree(
    topology: Topology,
    sampler: SamplerRows,
    keys: Array,
    root: Int[Array, " B"],
    seen: Array,
    read: Read,
    *,
    draws: Draws,
    size: int,
    vocabulary: Int[Array, " V"] | None = None,
) -> Proposal:
    """The tree behind the tokens `root`, whose children are drawn from the `size` likeliest."""
    features = sampler.features
    if not (features.sample or features.penalty or features.bias):
        size = topology.branching  # of more tokens nothing is asked
    tokens, picks = root[:, None], jnp.zeros((len(root), 1), jnp.int32)
    ids, logits = [], []
    for level, (parents, breadth, row, rank) in enumerate(growth(topology)):
        ancestors = topology.ancestors[parents][:, : tokens.shape[1]]
        used = seen_at(ancestors, tokens, seen)
        found, log_q = support(read(level, parents, tokens), size, sampler, used, vocabulary)
        level_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, level)
        place = draw_children(draws, level_keys, log_q, sampler, breadth)
        pick = place[:, row, rank]
        drawn = jnp.take_along_axis(found[:, row], pick[..., None], axis=-1)[..., 0]
        tokens = jnp.concatenate([tokens, drawn], axis=1)
        picks = jnp.concatenate([picks, pick], axis=1)
        ids.append(found)
        logits.append(log_q)
    return Proposal(tokens, picks, jnp.concatenate(ids, axis=1), jnp.concatenate(logits, axis=1))


def check_branching(topology: Topology, size: int) -> None:
    """Refuses a tree with more children a node than a draft proposes tokens."""
    if topology.branching > size:
        raise ValueError(
            f"a node of the tree has {topology.branching} children, but the draft proposes "
            f"{size} tokens; raise support={size}"
        )
