"""The probability that keys receive from queries, for tiers that choose by it.

It is a second pass over the keys, once the softmax' sum is known, and is made only where the policy
asks for it (`Policy.weighs`): of every query, or of the last `Policy.query_window` of each row.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfer.cache.base import Segment
from jaxinfer.cache.context import StepContext
from jaxinfer.cache.fresh import FreshTokens, make_mask_fn
from jaxinfer.cache.policy import Policy
from jaxinfer.ops.attention import AttentionSpec
from jaxinfer.typing import Leaf


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class KeyWeights:
    """Probability given to keys, f32[B, K, Q, keys]; Q as in `FreshTokens.key_weights`."""

    stored: Leaf  # per tier, per segment that holds tokens
    fresh: Leaf


def key_weights(
    policy: Policy,
    spec: AttentionSpec,
    ctx: StepContext,
    by_tier: tuple[tuple[Segment, ...], ...],
    fresh: FreshTokens,
    lse: Array,
    latest: Callable[[str], Array],
) -> KeyWeights:
    """What the call's queries give to the stored keys of each tier and to the fresh ones.

    `latest(phase)` are the queries of a phase [B, K, G, T, H], a value of their own at each call.
    """
    rows, valid, of_fresh = _wanted(policy, ctx, fresh, lse)
    positions = {phase: rows(x, 1) for phase, x in fresh.positions.items()}
    lse = rows(lse, 3)
    stored = []
    for tier in by_tier:
        weights = []
        for segment in tier:
            if segment.holds_tokens:
                phase = segment.query_phase
                mask_fn = make_mask_fn(policy, spec, positions["absolute"], positions[phase])
                q = rows(latest(phase), 3)
                given = segment.key_weights(spec, q, positions[phase], mask_fn, lse)
                weights.append(_summed(given, valid, ctx.is_tree))
        stored.append(tuple(weights))
    return KeyWeights(stored=tuple(stored), fresh=of_fresh)


def _wanted(policy: Policy, ctx: StepContext, fresh: FreshTokens, lse: Array):
    """How to take the queries that count from an array, which of them are valid, and what they give
    to the fresh keys."""
    if policy.query_window is None:
        return (lambda x, axis: x), ctx.valid, fresh.key_weights(lse)
    count = ctx.valid.sum(axis=1, dtype=jnp.int32)
    order = count[:, None] - policy.query_window + jnp.arange(policy.query_window, dtype=jnp.int32)
    valid, index = order >= 0, jnp.maximum(order, 0)

    def rows(x: Array, axis: int) -> Array:
        shape = [1] * x.ndim
        shape[0], shape[axis] = index.shape
        return jnp.take_along_axis(x, index.reshape(shape), axis=axis)

    return rows, valid, fresh.last_key_weights(lse, index, valid, rows)


def _summed(
    attn_weight: Float[Array, "B K T S"], valid: Array, is_tree: bool
) -> Float[Array, "B K _ S"]:
    """Weights from valid queries: per query in a tree, summed in a chain, which commits all or
    none."""
    attn_weight = jnp.where(valid[:, None, :, None], attn_weight, 0.0)
    return attn_weight if is_tree else attn_weight.sum(axis=2, keepdims=True)


def received(
    attn_weight: Float[Array, "B K _ S"],
    accepted: Int[Array, "B A"] | None,
    count: Int[Array, " B"],
) -> Float[Array, "B K S"]:
    """What the accepted queries gave."""
    if attn_weight.shape[2] > 1 and accepted is not None:
        attn_weight = gather(attn_weight, accepted)
    given = jnp.arange(attn_weight.shape[2]) < count[:, None]
    return jnp.where(given[:, None, :, None], attn_weight, 0.0).sum(axis=2)


def gather(x: Array, index: Int[Array, "B A"]) -> Array:
    """Entries `index` of axis 2 of `x` [B, K|1, T, ...]."""
    index = index.reshape(index.shape[0], 1, index.shape[1], *(1,) * (x.ndim - 3))
    return jnp.take_along_axis(x, index, axis=2)
