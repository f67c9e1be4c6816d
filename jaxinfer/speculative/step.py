"""The step of speculative decoding: draft a tree, read it with the target in one pass, keep the
accepted path.

It takes the place of `jaxinfer.decode.loop.plain_step` in the same compiled loop. Nothing is
written before the verdict, so a rejected draft leaves no trace in any cache.
"""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxinfer.cache.context import StepContext
from jaxinfer.cache.policy import Cache
from jaxinfer.config import ModelConfig
from jaxinfer.decode.state import (
    DecodeState,
    Requests,
    chosen_log_probs,
    emit,
    likeliest,
    sampler_now,
    step_keys,
)
from jaxinfer.models.stack import commit, forward
from jaxinfer.speculative.drafters import Drafter
from jaxinfer.speculative.topology import Topology
from jaxinfer.speculative.verify import verify
from jaxinfer.typing import Leaf, Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Speculation:
    """What speculative steps carry beside `DecodeState`; every leaf has the row first."""

    drafter: Leaf  # the drafter's state
    emitted: Leaf  # i32[B, L + 1], steps of each row by the number of tokens that they emitted
    chosen: Leaf  # i32[B, L, C + 1], by depth and rank: children accepted; the last column: none


@dataclass(frozen=True, kw_only=True)
class TreeStep:
    """One speculative step; hashable, a static argument of the loop. `params["draft"]` are the
    drafter's parameters, absent where it has none."""

    topology: Topology
    drafter: Drafter

    def init_state(self, drafter: Leaf, batch: int) -> Speculation:
        levels, widest = self.topology.levels, max(self.topology.branching, 1)
        return Speculation(
            drafter=drafter,
            emitted=jnp.zeros((batch, levels + 1), jnp.int32),
            chosen=jnp.zeros((batch, levels, widest + 1), jnp.int32),
        )

    def __call__(
        self, cfg: ModelConfig, params: Params, requests: Requests, state: DecodeState
    ) -> DecodeState:
        topology, drafter, old = self.topology, self.drafter, state.speculation
        draft_params = params.get("draft", {})
        rows = jnp.arange(state.token.shape[0])[:, None]
        keys, sampler = step_keys(requests, state), sampler_now(requests, state)
        draw_keys, verify_keys = (
            jax.vmap(jax.random.fold_in, (0, None))(keys, number) for number in (1, 2)
        )
        proposal, drafted = drafter.propose(
            draft_params, topology, sampler, draw_keys, old.drafter, state.token, state.seen
        )
        out = forward(
            cfg, params, proposal.tokens, state.cache, tree_context(topology, state.cache.length)
        )
        verdict = verify(
            topology, drafter.rule, sampler, verify_keys, out.logits, proposal, state.seen,
            drawn_alike(requests, state, acceptable(topology, state.cache)),
        )  # fmt: skip
        order = jnp.arange(topology.levels)
        tokens = jnp.roll(proposal.tokens[rows, verdict.path], -1, axis=1)
        tokens = jnp.where(order == verdict.accepted[:, None], verdict.bonus[:, None], tokens)
        logits = out.logits[rows, verdict.path]
        log_probs = jax.vmap(chosen_log_probs)(logits, tokens)
        found = likeliest(requests, logits)
        active = ~state.done
        cache = state.cache
        state, count = emit(state, requests, tokens, log_probs, verdict.accepted + 1, found)
        # The root and all emitted tokens but the last one, which is the next root.
        cache = commit(cfg, params, cache, out.fresh, verdict.path, count, verdict.bonus)
        kept = drafter.commit(
            draft_params, topology, old.drafter, drafted, proposal, verdict.path, tokens,
            count, out.hidden,
        )  # fmt: skip
        tried = jnp.where(active[:, None], verdict.chosen, -1)
        outcome = jnp.arange(old.chosen.shape[2])
        speculation = Speculation(
            drafter=kept,
            emitted=old.emitted.at[rows[:, 0], count].add(active.astype(jnp.int32)),
            chosen=old.chosen + (tried[..., None] == outcome).astype(jnp.int32),
        )
        return replace(state, cache=cache, steps=state.steps + 1, speculation=speculation)


def tree_context(topology: Topology, length: Int[Array, " B"]) -> StepContext:
    """The context of a whole tree behind `length` committed tokens."""
    shape = (length.shape[0], topology.nodes)
    return StepContext(
        length=length,
        offset=jnp.broadcast_to(jnp.asarray(topology.depth, jnp.int32), shape),
        valid=jnp.ones(shape, bool),
        visible=jnp.asarray(topology.ancestors)[None],
        parent=jnp.asarray(topology.parent, jnp.int32)[None],
        levels=tuple(map(int, topology.level_bounds)),
        is_tree=True,
    )


def acceptable(topology: Topology, cache: Cache) -> Int[Array, " B"]:
    """Nodes below the root that may be accepted: the policies' horizon counts the root too."""
    limits = [policy.horizon(cache.length) for policy in dict.fromkeys(cache.policies)]
    finite = [limit for limit in limits if limit is not None]
    most = jnp.full_like(cache.length, topology.levels - 1)
    return functools.reduce(jnp.minimum, [most, *(limit - 1 for limit in finite)])


def drawn_alike(requests: Requests, state: DecodeState, most: Int[Array, " B"]) -> Int[Array, " B"]:
    """`most` nodes below the root, or as many as the sampler of this step holds for."""
    if requests.min_tokens is None or not requests.sampler.features.mask:
        return most
    short = requests.min_tokens - state.written
    most = jnp.where(short > 0, jnp.minimum(most, short - 1), most)
    return jnp.where(requests.one_by_one, 0, most)
