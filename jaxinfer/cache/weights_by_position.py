"""Whom each query head attends to through a policy's cache, by position in the text.

Where `jaxinfer.cache.weights` sums over the heads of a group what stored slots receive, this is per
head and query, and a key is found under its position, whichever slot holds it. It is for those who
look at attention: it reads the keys once more for every head of a group.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinfer.cache.attend import Rotations, attend, stored_segments
from jaxinfer.cache.context import StepContext
from jaxinfer.cache.policy import Policy
from jaxinfer.ops.attention import AttentionSpec
from jaxinfer.typing import Leaf, Params


def weights_by_position(
    policy: Policy,
    spec: AttentionSpec,
    state: tuple[Leaf, ...],
    aux: Params | None,
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    ctx: StepContext,
    phases: Rotations,
    sink: Float[Array, " N"] | None = None,
    *,
    positions: int,
) -> Float[Array, "B N T P"]:
    """The probability that each query gives to the tokens at positions 0 to `positions` - 1.

    The other arguments are those of `jaxinfer.cache.attend.attend`, for a chain. A row sums to 1,
    less what a sink logit receives; a position that was evicted has 0. The softmax is that over
    tokens: a low-rank state of evicted ones takes no part. Extra letter: P positions.

    Raises:
      ValueError: the policy reads a token after storing it (`Policy.commit_first`).
    """
    if policy.commit_first:
        raise ValueError(f"policy {policy.name!r} stores tokens before it reads them; take another")
    batch, heads, size, width = q.shape
    groups = heads // k.shape[1]
    # Per query, as in a tree: a chain's weights are summed over its queries.
    asking = replace(policy, weigh_keys="always", query_window=None)
    apart = replace(ctx, is_tree=True)
    places = _positions(policy, spec, state, aux, ctx)
    found = []
    for head in range(groups):
        own = spec
        if spec.slopes is not None:
            own = replace(spec, slopes=spec.slopes[head::groups])
        some = q.reshape(batch, -1, groups, size, width)[:, :, head]
        to = None if sink is None else sink[head::groups]
        _, items = attend(asking, own, state, aux, some, k, v, apart, phases, to)
        stored = [x for tier in items.attn_weight.stored for x in tier]
        given = jnp.concatenate([*stored, items.attn_weight.fresh], axis=3)
        found.append(_scattered(given, places, positions))
    return jnp.stack(found, axis=2).reshape(batch, heads, size, positions)


def _positions(
    policy: Policy, spec: AttentionSpec, state: tuple[Leaf, ...], aux: Params | None,
    ctx: StepContext,
) -> Array:  # fmt: skip
    """i32[B, K|1, J]: of all slots of all segments, and of the fresh tokens behind them."""
    by_tier = stored_segments(policy, spec, state, aux, ctx.length, None) if ctx.reads else ()
    places = [segment.pos for tier in by_tier for segment in tier if segment.holds_tokens]
    places.append(ctx.positions[:, None])
    batch, heads = (max(x.shape[axis] for x in places) for axis in (0, 1))
    spread = [jnp.broadcast_to(x, (batch, heads, x.shape[2])) for x in places]
    return jnp.concatenate(spread, axis=2)


def _scattered(
    given: Float[Array, "B K T J"], places: Array, positions: int
) -> Float[Array, "B K T P"]:
    places = jnp.broadcast_to(places, (*given.shape[:2], given.shape[3]))

    def one(given: Array, places: Array) -> Array:
        empty = jnp.zeros((given.shape[0], positions), given.dtype)
        return empty.at[:, places].add(given, mode="drop")

    return jax.vmap(jax.vmap(one))(given, places)
