"""Lossless verification of a drafted tree: which path is accepted, and the token that follows it.

Sequoia's rule (arXiv 2402.12374, algorithm 2): at every node the children are tried in the order in
which they were drawn; child x is accepted with probability min(1, R(x) / D(x)), else the target's
residual R loses what D offered and D loses x. The token behind the last accepted node is drawn from
the residual that is left. The output is distributed as the target alone would draw it, whatever the
draft.

Away from the draft's support of M tokens the residual is a multiple of the target's distribution,
so a rejection costs M and not V; only visited nodes are normalised.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxinfer.decode.sampling import SamplerRows
from jaxinfer.speculative.proposal import USED, Proposal
from jaxinfer.speculative.topology import Topology
from jaxinfer.typing import Leaf

Rule = Literal["without_replacement", "with_replacement", "point"]


class Verdict(NamedTuple):
    """`path[:, : accepted + 1]` are the accepted nodes from the root on; L levels.

    `chosen` says which child was accepted at the path's nodes that have children.
    """

    path: Leaf  # i32[B, L]
    accepted: Leaf  # i32[B], nodes below the root
    bonus: Leaf  # i32[B], the token behind the path
    chosen: Leaf  # i32[B, L], rank of the accepted child at each depth, C where none was, -1 beyond


class Residual(NamedTuple):
    """A distribution over the vocabulary: `inside` on the draft's support, elsewhere the target's
    probability times `factor`."""

    inside: Leaf  # f32[B, M]
    factor: Leaf  # f32[B]

    def without(self, offered: Float[Array, "B M"], outside: Float[Array, " B"]) -> "Residual":
        """What is left when a draft distribution's child was rejected: norm(max(R - D, 0)).

        `outside` is the target's probability off the support. If nothing is left, which happens
        with probability 0 and so by rounding only, it stays as it is.
        """
        left = jnp.maximum(self.inside - offered, 0.0)
        total = left.sum(axis=-1) + self.factor * outside
        some = total > 0
        total = jnp.where(some, total, 1.0)
        return Residual(
            jnp.where(some[:, None], left / total[:, None], self.inside),
            jnp.where(some, self.factor / total, self.factor),
        )


class _Trial(NamedTuple):
    """The trial of one node's children per row."""

    rank: Leaf  # i32[], of the child on trial
    residual: "Residual"
    draft: Leaf  # f32[B, M], logits of the draft distribution
    taken: Leaf  # i32[B], rank of the accepted child, -1 so far


class _Walk(NamedTuple):
    node: Leaf  # i32[B]
    path: Leaf  # i32[B, L]
    accepted: Leaf  # i32[B]
    chosen: Leaf  # i32[B, L]
    residual: Leaf  # f32[B, V], of the node where the walk ended
    seen: Leaf
    done: Leaf  # bool[B]


def verify(
    topology: Topology,
    rule: Rule,
    sampler: SamplerRows,
    keys: Array,
    logits: Float[Array, "B N V"],
    proposal: Proposal,
    seen: Int[Array, "B _"],
    most: Int[Array, " B"],
) -> Verdict:
    """The verdict on a proposal; `logits` are the target's at every node.

    `rule` must be that of the draws: "without_replacement" (Sequoia), "with_replacement"
    (SpecInfer, arXiv 2305.09781), "point" for children that are no random draws of `proposal`'s
    distribution: it accepts a child as often as the target draws it. `most`: nodes below the root
    that may be accepted. `keys` [B] are the rows' keys of this step.
    """
    if not sampler.features.sample:
        return _greedy(topology, sampler, logits, proposal.tokens, seen, most)
    batch, nodes, vocab = logits.shape
    accept_keys, bonus_keys = (_folded(keys, i) for i in (0, 1))
    uniforms = jax.vmap(lambda key: jax.random.uniform(key, (nodes,)))(accept_keys)
    walk = jax.lax.while_loop(
        lambda walk: ~walk.done.all(),
        lambda walk: _visit(topology, rule, sampler, logits, proposal, uniforms, most, walk),
        _Walk(
            node=jnp.zeros((batch,), jnp.int32),
            path=jnp.zeros((batch, topology.levels), jnp.int32),
            accepted=jnp.zeros((batch,), jnp.int32),
            chosen=jnp.full((batch, topology.levels), -1, jnp.int32),
            residual=jnp.zeros((batch, vocab), jnp.float32),
            seen=seen,
            done=jnp.zeros((batch,), bool),
        ),
    )
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (vocab,)))(bonus_keys)
    bonus = jnp.argmax(jnp.log(walk.residual) + noise, axis=-1).astype(jnp.int32)
    return Verdict(walk.path, walk.accepted, bonus, walk.chosen)


def _visit(
    topology: Topology,
    rule: Rule,
    sampler: SamplerRows,
    logits: Float[Array, "B N V"],
    proposal: Proposal,
    uniforms: Float[Array, "B N"],
    most: Int[Array, " B"],
    walk: _Walk,
) -> _Walk:
    """Tries the children of each row's node: one step down, or the end of the row's walk."""
    batch, _, vocab = logits.shape
    rows, node = jnp.arange(batch), walk.node
    first = jnp.asarray(topology.first_child)[node]
    has_children = topology.child_count > 0
    slots = jnp.asarray(np.where(has_children, np.cumsum(has_children) - 1, 0))
    target = jnp.exp(sampler.log_probs(logits[rows, node], walk.seen))
    ids = proposal.ids[rows, slots[node]]
    stops = walk.done | (most - walk.accepted <= 0)
    children = jnp.where(stops, 0, jnp.asarray(topology.child_count)[node])
    # A node without children has no draft distribution: its residual is all "outside".
    ids = jnp.where((children > 0)[:, None], ids, vocab)
    outside = target.at[rows[:, None], ids].set(0.0, mode="drop").sum(axis=-1)
    inside = jnp.take_along_axis(target, jnp.minimum(ids, vocab - 1), axis=-1)
    inside = jnp.where(ids < vocab, inside, 0.0)

    trial = _try_children(rule, first, children, proposal, uniforms, _Trial(
        rank=jnp.int32(0),
        residual=Residual(inside, jnp.ones((batch,), jnp.float32)),
        draft=proposal.logits[rows, slots[node]],
        taken=jnp.full((batch,), -1, jnp.int32),
    ), outside)  # fmt: skip
    moves = trial.taken >= 0
    ends = ~walk.done & ~moves
    left, factor = trial.residual
    residual = (target * factor[:, None]).at[rows[:, None], ids].set(left, mode="drop")
    child = jnp.where(moves, first + trial.taken, node)
    accepted = walk.accepted + moves
    size = walk.path.shape[1]
    outcome = jnp.where(moves, trial.taken, max(topology.branching, 1))
    tried = jnp.where(children > 0, walk.accepted, size)
    seen = walk.seen
    if seen.shape[1] > 1:
        token = jnp.where(moves, proposal.tokens[rows, child], vocab)
        seen = seen.at[rows, token].add(1, mode="drop")
    return _Walk(
        node=child,
        path=walk.path.at[rows, jnp.where(moves, accepted, size)].set(child, mode="drop"),
        accepted=accepted,
        chosen=walk.chosen.at[rows, tried].set(outcome, mode="drop"),
        residual=jnp.where(ends[:, None], residual, walk.residual),
        seen=seen,
        done=walk.done | ends,
    )


def _try_children(
    rule: Rule,
    first: Int[Array, " B"],
    count: Int[Array, " B"],
    proposal: Proposal,
    uniforms: Float[Array, "B N"],
    trial: _Trial,
    outside: Float[Array, " B"],
) -> _Trial:
    """Tries each row's children `first`, `first + 1`, ... in turn until one is accepted."""
    rows = jnp.arange(len(first))
    last = proposal.tokens.shape[1] - 1

    def waiting(trial: _Trial) -> Array:
        return (trial.taken < 0) & (trial.rank < count)

    def attempt(trial: _Trial) -> _Trial:
        child = jnp.minimum(first + trial.rank, last)
        place = proposal.picks[rows, child]
        one = jax.nn.one_hot(place, trial.draft.shape[1])
        offered = one if rule == "point" else jax.nn.softmax(trial.draft, axis=-1)
        # Strict and without a division: a token of probability 0 is never accepted.
        wanted = trial.residual.inside[rows, place]
        accepts = waiting(trial) & (uniforms[rows, child] * offered[rows, place] < wanted)
        rejects = waiting(trial) & ~accepts
        residual = jax.tree.map(
            lambda new, old: jnp.where(rejects.reshape(-1, *[1] * (old.ndim - 1)), new, old),
            trial.residual.without(offered, outside),
            trial.residual,
        )
        used = rejects[:, None] & (one > 0)
        draft = jnp.where(used, USED, trial.draft) if rule == "without_replacement" else trial.draft
        taken = jnp.where(accepts, trial.rank, trial.taken)
        return _Trial(trial.rank + 1, residual, draft, taken)

    return jax.lax.while_loop(lambda trial: waiting(trial).any(), attempt, trial)


def _greedy(
    topology: Topology,
    sampler: SamplerRows,
    logits: Float[Array, "B N V"],
    tokens: Int[Array, "B N"],
    seen: Int[Array, "B _"],
    most: Int[Array, " B"],
) -> Verdict:
    """The verdict when every row takes the likeliest token: no walk is needed."""
    batch, nodes, vocab = logits.shape
    depth, parent = jnp.asarray(topology.depth), np.maximum(topology.parent, 0)
    every = jax.tree.map(lambda x: jnp.repeat(x, nodes, axis=0), sampler)
    seen = seen_at(topology.ancestors, tokens, seen).reshape(batch * nodes, -1)
    adjusted = every.adjusted(logits.reshape(-1, vocab), seen)
    best = jnp.argmax(adjusted, axis=-1).astype(jnp.int32).reshape(batch, nodes)
    agrees = (best[:, parent] == tokens).at[:, 0].set(True) & (depth <= most[:, None])
    whole = (agrees[:, None, :] | ~jnp.asarray(topology.ancestors)).all(axis=-1)
    end = jnp.argmax(jnp.where(whole, depth, -1), axis=-1)
    accepted = depth[end]
    path = np.zeros((nodes, topology.levels), np.int32)
    for node in range(nodes):
        above = np.flatnonzero(topology.ancestors[node])
        path[node, : len(above)] = above
    widest = max(topology.branching, 1)
    path = jnp.asarray(path)[end]
    order = jnp.arange(topology.levels)
    following = jnp.roll(path, -1, axis=1)
    chosen = jnp.where(order < accepted[:, None], jnp.asarray(topology.rank)[following], -1)
    stopped = (order == accepted[:, None]) & (accepted < most)[:, None]
    has_children = (jnp.asarray(topology.child_count)[end] > 0)[:, None]
    chosen = jnp.where(stopped & has_children, widest, chosen)
    bonus = jnp.take_along_axis(best, end[:, None], axis=1)[:, 0]
    return Verdict(path, accepted, bonus, chosen.astype(jnp.int32))


def seen_at(
    ancestors: np.ndarray, tokens: Int[Array, "B N"], seen: Int[Array, "B V"]
) -> Int[Array, "B W V"]:
    """What the text at each of W nodes holds: `seen`, and the tokens of the node and of those above
    it (`ancestors` bool[W, N]) but the root's, which `seen` counts."""
    width, nodes = ancestors.shape
    batch = tokens.shape[0]
    below = jnp.asarray(ancestors & (np.arange(nodes) > 0))
    index = jnp.where(below, tokens[:, None, :], seen.shape[1])
    start = jnp.broadcast_to(seen[:, None], (batch, width, seen.shape[1]))
    place = jnp.arange(batch)[:, None, None], jnp.arange(width)[None, :, None]
    return start.at[(*place, index)].add(1, mode="drop")


def _folded(keys: Array, number: int) -> Array:
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)
