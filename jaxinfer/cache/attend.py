"""One layer's attention over what its policy stores and the fresh tokens, and the commit of the
latter.

This is all an attention block knows of a cache. `attend` rotates the queries once per query phase,
merges the partials of all segments and of the fresh block, and returns the fresh tokens as the
policy stores them. `commit_layer` pushes accepted tokens through the tiers.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfer.cache.base import Items, Policy, StepContext
from jaxinfer.config import RopeConfig
from jaxinfer.nn.rope import Rotation, rotate, rotation
from jaxinfer.ops.attention import (
    AttentionSpec,
    finish,
    key_mass,
    log_sum_exp,
    merge,
    partial_attention,
)
from jaxinfer.typing import Leaf, Params

Rotations = dict[str, Rotation | None]


def rotations(policy: Policy, rope: RopeConfig | None, ctx: StepContext) -> Rotations:
    """The rotation of every query phase; computed once per forward pass, shared by its layers."""
    if rope is None:
        return {"absolute": None, "in_cache": None}
    phases: Rotations = {"absolute": rotation(rope, ctx.positions)}
    if policy.positions == "in_cache":
        phases["in_cache"] = rotation(rope, policy.in_cache_positions(ctx))
    return phases


def attend(
    policy: Policy,
    spec: AttentionSpec,
    state: tuple[Leaf, ...],
    aux: Params | None,
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    ctx: StepContext,
    phases: Rotations,
) -> tuple[Float[Array, "B N T H"], Items]:
    """Attention output in the dtype of `q`, and the fresh tokens in the form the policy stores.

    `q` and `k` arrive unrotated. With `policy.observe` the items carry `mass` [B, K, T, S + T]: the
    probability that every query gave every stored key (segments in order) and fresh key.
    """
    batch, heads, size, width = q.shape
    grouped = (batch, k.shape[1], heads // k.shape[1], size, width)
    q_pos = ctx.positions

    def turn(x: Array, phase: str) -> Array:
        angles = phases[phase]
        return x if angles is None else rotate(x, angles)

    def see(k_pos: Int[Array, "B _ J"], ok: Array) -> tuple[Array, Array]:
        """Distance and visibility [B, K|1, T, J] of keys at `k_pos`."""
        queries, keys = q_pos[:, None, :, None], k_pos[:, :, None, :]
        distance = queries - keys
        visible = ok & policy.admit(queries, keys)
        if spec.window is not None:
            visible = visible & (distance < spec.window)
        return distance, visible

    queries = {"absolute": turn(q, "absolute").reshape(grouped)}
    if policy.positions == "in_cache":
        queries["in_cache"] = turn(q, "in_cache").reshape(grouped)
    fresh_k = turn(k, "absolute")
    fresh_distance, fresh_visible = see(q_pos[:, None], ctx.fresh_visible()[:, None])
    fresh = (queries["absolute"], fresh_k, fresh_distance, fresh_visible)

    partial = partial_attention(spec, *fresh[:2], v, *fresh[2:])
    segments = _segments(policy, state, aux, ctx.length) if ctx.reads else ()

    def see_stored(k_pos: Array, ok: Array) -> tuple[Array, Array]:
        return see(k_pos, ok[:, :, None])

    for segment in segments:
        here = queries[segment.query_phase]
        partial = merge(partial, segment.partial(spec, here, q_pos, see_stored))
    out = finish(partial).reshape(q.shape).astype(q.dtype)

    mass = None
    if policy.observe:
        lse = log_sum_exp(partial)
        parts = [s.key_mass(spec, queries[s.query_phase], q_pos, see_stored, lse) for s in segments]
        parts.append(key_mass(spec, *fresh, lse))
        mass = jnp.where(ctx.valid[:, None, :, None], jnp.concatenate(parts, axis=-1), 0.0)
    stored_k = fresh_k if policy.positions == "absolute" else k
    return out, Items(k=stored_k, v=v, pos=q_pos[:, None], mass=mass)


def commit_layer(
    policy: Policy,
    state: tuple[Leaf, ...],
    aux: Params | None,
    fresh: Items,
    length: Int[Array, " B"],
    take: Int[Array, "B A"] | None,
    count: Int[Array, " B"],
    after: Array,
) -> tuple[Leaf, ...]:
    """The tier states after the fresh tokens `take[b, :count[b]]` (None: in order) were pushed."""
    items: Items | None = fresh
    if take is not None:
        items = jax.tree.map(lambda x: _take(x, take), fresh)
    n_in, new = length, []
    for tier, tier_state in zip(policy.tiers, state, strict=True):
        if items is None:
            new.append(tier_state)
            continue
        tier_state, items, spilled = tier.push(tier_state, aux, items, n_in, count, after)
        new.append(tier_state)
        n_in, count = tier.passed(n_in), spilled
    return tuple(new)


def _segments(policy: Policy, state: tuple[Leaf, ...], aux: Params | None, length: Array):
    n_in, found = length, []
    for tier, tier_state in zip(policy.tiers, state, strict=True):
        found.extend(tier.segments(tier_state, aux, n_in))
        n_in = tier.passed(n_in)
    return tuple(found)


def _take(x: Array, take: Int[Array, "B A"]) -> Array:
    """Entries `take` of axis 2 of `x` [B, K|1, T, ...]."""
    index = take[:, None, :].reshape(take.shape[0], 1, take.shape[1], *(1,) * (x.ndim - 3))
    return jnp.take_along_axis(x, index, axis=2)
