"""One layer's attention over what its policy stores and the fresh tokens, and the commit of the
latter.

This is all an attention block knows of a cache. `attend` rotates the queries once per query phase,
merges the partials of all segments and of the fresh block, and returns the fresh tokens as the
policy stores them. `commit_layer` pushes accepted tokens through the tiers.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxinfer.cache.base import Items, Segment
from jaxinfer.cache.context import CommitContext, PushContext, StepContext
from jaxinfer.cache.dense import DenseSegment
from jaxinfer.cache.fresh import FreshTokens, make_mask_fn
from jaxinfer.cache.policy import Policy
from jaxinfer.cache.weights import KeyWeights, gather, key_weights, received
from jaxinfer.config import RopeConfig
from jaxinfer.nn.rope import Rotation, rotate, rotation
from jaxinfer.ops.attention import (
    AttentionSpec,
    Partial,
    finish,
    log_sum_exp,
    merge,
    sink_partial,
)
from jaxinfer.typing import Leaf, Params
from pallas_kernels.softmax_state import ExtraKeys

Rotations = dict[str, Rotation | None]


def rotations(policy: Policy, rope: RopeConfig | None, ctx: StepContext) -> Rotations:
    """The rotation of every query phase; computed once per forward pass, shared by its layers."""
    if rope is None:
        return {"absolute": None, "in_cache": None}
    if policy.positions == "absolute":
        return {"absolute": rotation(rope, ctx.positions)}
    # In a stream of millions of tokens float32 angles are off by hundredths of a radian.
    bent = policy.in_cache_positions(ctx.positions)
    return {
        "absolute": rotation(rope, ctx.positions, exact=True),
        "in_cache": rotation(rope, bent, exact=True),
    }


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
    sink: Float[Array, " N"] | None = None,
    selected: Bool[Array, "B T K"] | None = None,
) -> tuple[Float[Array, "B N T H"], Items]:
    """Attention output in the dtype of `q`, and the fresh tokens in the form the policy stores.

    `q` and `k` arrive unrotated, keys leave rotated by their absolute position. `sink` is a logit
    per head that takes part in the softmax without a value. Where the policy weighs keys the items
    carry `KeyWeights`, the probability that the queries gave to every stored and fresh key.
    `selected` says which key/value heads each token uses: what it gets from others is of no use,
    and may be left out.
    """
    batch, heads, size, width = q.shape
    grouped = (batch, k.shape[1], heads // k.shape[1], size, width)
    positions = {"absolute": ctx.positions}
    if policy.positions == "in_cache":
        positions["in_cache"] = policy.in_cache_positions(ctx.positions)

    def turn(x: Array, phase: str) -> Array:
        angles = phases[phase]
        return x if angles is None else rotate(x, angles)

    queries = {phase: turn(q, phase).reshape(grouped) for phase in positions}
    items = _with_pending(policy, ctx, turn(k, "absolute"), v)
    length, reads = ctx.length, ctx.reads
    commits_first = policy.commit_first and size == 1
    if commits_first:
        state, length, reads = _with(policy, state, aux, items, ctx), length + 1, True
    by_tier = stored_segments(policy, spec, state, aux, length, selected) if reads else ()

    latest, weighs = dict(queries), policy.weighs(ctx.is_prompt)

    def own(phase: str) -> Array:
        # The barrier makes each segment's queries another value: XLA:GPU merges products that share
        # an operand by concatenating the others, which are whole caches.
        latest[phase] = jax.lax.optimization_barrier(latest[phase])
        return latest[phase]

    def arguments(segment: Segment):
        phase = segment.query_phase
        mask_fn = make_mask_fn(policy, spec, positions["absolute"], positions[phase])
        return spec, own(phase), positions[phase], mask_fn

    admits = policy
    if policy.prompt == "whole" and not ctx.reads and policy.positions == "absolute":
        admits = replace(policy, window=None)
    fresh = FreshTokens(
        policy=admits, spec=spec, ctx=ctx, items=items, queries=queries, positions=positions
    )
    tokens, summaries, final = _in_order(by_tier)
    few = None
    if final is not None and final.ends_softmax and not (weighs or commits_first):
        few = fresh.few()
    partial = None if sink is None else sink_partial(queries["absolute"], sink)
    if not commits_first and few is None:
        partial = _merged(partial, fresh.partial())
    for segment in tokens:
        if few is None or segment is not final:
            partial = _merged(partial, segment.partial(*arguments(segment)))
    if few is not None:
        assert final is not None
        _, query, _, mask_fn = arguments(final)
        return final.output(spec, query, mask_fn, ExtraKeys(*few, partial)).reshape(q.shape), items

    assert partial is not None
    if weighs:
        lse = log_sum_exp(partial)  # over tokens: what summarises evicted ones takes no part
        weights = key_weights(policy, spec, ctx, by_tier, fresh, lse, own)
        items = replace(items, attn_weight=weights)
    for segment in summaries:
        partial = merge(partial, segment.partial(*arguments(segment)))
    return finish(partial).reshape(q.shape).astype(q.dtype), items


def _with_pending(policy: Policy, ctx: StepContext, k: Array, v: Array) -> Items:
    """The fresh tokens of this call behind those of earlier ones that nobody has committed."""
    items = Items(k=k, v=v, pos=ctx.positions[:, None])
    if ctx.pending is None:
        return items
    if policy.weigh_keys == "always":
        raise ValueError(
            f"policy {policy.name!r} weighs tokens by what they receive, which a tree that "
            "grows level by level does not know; draft with full, kivi or streaming"
        )
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=2), ctx.pending, items)


def _in_order(
    by_tier: tuple[tuple[Segment, ...], ...],
) -> tuple[list[Segment], list[Segment], Segment | None]:
    """Segments that hold tokens, those that summarise evicted ones, and which comes last.

    What ends the softmax adds up splits, which only long segments have: one launch for both.
    """
    tokens, summaries = (
        [segment for tier in by_tier for segment in tier if segment.holds_tokens == holds]
        for holds in (True, False)
    )
    longest = max(tokens, key=lambda segment: segment.capacity, default=None)
    return tokens, summaries, summaries[-1] if summaries else longest


def _merged(partial: Partial | None, more: Partial) -> Partial:
    return more if partial is None else merge(partial, more)


def commit_layer(
    policy: Policy, state: tuple[Leaf, ...], aux: Params | None, fresh: Items, ctx: CommitContext
) -> tuple[Leaf, ...]:
    """The tier states after the accepted fresh tokens were pushed."""
    stored: tuple[tuple[Leaf, ...], ...] = ()
    if isinstance(fresh.attn_weight, KeyWeights):
        weights = jax.tree.map(lambda x: received(x, ctx.accepted, ctx.count), fresh.attn_weight)
        stored, fresh = weights.stored, replace(fresh, attn_weight=weights.fresh)
    items: Items | None = fresh
    if ctx.accepted is not None:
        # Taken from what attention read: XLA:GPU would rotate the keys of all layers once more.
        fresh = jax.lax.optimization_barrier(fresh)
        items = jax.tree.map(lambda x: gather(x, ctx.accepted), fresh)
    n_in, count, new = ctx.length, ctx.count, []
    for number, (tier, tier_state) in enumerate(zip(policy.tiers, state, strict=True)):
        if items is None:
            new.append(tier_state)
            continue
        push = PushContext(
            n_in=n_in,
            count=count,
            after=ctx.after,
            length=ctx.length,
            stored_weights=stored[number] if stored else (),
            is_prompt=ctx.is_prompt,
            spills=number + 1 < len(state),  # what the last tier loses is lost
        )
        tier_state, items, count = tier.push(tier_state, aux, items, push)
        new.append(tier_state)
        n_in = tier.passed_by(tier_state, n_in)
    return tuple(new)


def stored_segments(
    policy: Policy,
    spec: AttentionSpec,
    state: tuple[Leaf, ...],
    aux: Params | None,
    length: Array,
    selected: Bool[Array, "B T K"] | None,
) -> tuple[tuple[Segment, ...], ...]:
    """Per tier, the segments that it stores; those that can read a lone token's heads alone do."""

    def of_heads(segment: Segment) -> Segment:
        if selected is None or selected.shape[1] > 1 or policy.window is not None:
            return segment
        if isinstance(segment, DenseSegment) and segment.reads_heads(spec):
            return replace(segment, heads=selected[:, 0])
        return segment

    n_in, found = length, []
    for tier, tier_state in zip(policy.tiers, state, strict=True):
        found.append(tuple(map(of_heads, tier.segments(tier_state, aux, n_in))))
        n_in = tier.passed_by(tier_state, n_in)
    return tuple(found)


def _with(policy: Policy, state, aux, items: Items, ctx: StepContext) -> tuple[Leaf, ...]:
    """The state as if the one fresh token were committed (a copy: this is a reference)."""
    one = ctx.valid[:, 0].astype(jnp.int32)
    alone = CommitContext(length=ctx.length, accepted=None, count=one, after=ctx.length)
    return commit_layer(policy, state, aux, items, alone)
