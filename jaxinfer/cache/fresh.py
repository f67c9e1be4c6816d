"""Attention of a call's tokens to each other: causal or by tree, in blocks of queries.

With positions in the cache, fresh sinks are seen from the in-cache phase and all other fresh keys
from the absolute one, so that a prompt of any length equals the stream of its tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxinfer.cache.base import Items, QueryPhase
from jaxinfer.cache.context import StepContext
from jaxinfer.cache.policy import Policy
from jaxinfer.ops.attention import (
    NEGATIVE,
    AttentionSpec,
    Partial,
    key_weights,
    merge,
    partial_attention,
    scores,
)

QUERY_BLOCK = 512  # queries whose scores exist at a time
FEW = 64  # keys that a kernel reads in the end of a softmax

MaskFn = Callable[[Array, Array], tuple[Array, Array]]
Rows = Callable[[Array, int], Array]  # some queries of an array, along their axis


def make_mask_fn(policy: Policy, spec: AttentionSpec, absolute: Array, own: Array) -> MaskFn:
    """`mask_fn(k_pos [B, K|1, J], ok [B, K|1, (T,) J])`: distance and visibility [B, K|1, T, J].

    `absolute` i32[B, T] are the queries' positions, `own` those of their phase, from which distance
    is counted.
    """

    def mask_fn(k_pos: Array, ok: Array) -> tuple[Array, Array]:
        key = k_pos[:, :, None, :]
        ok = ok if ok.ndim == 4 else ok[:, :, None]
        distance = own[:, None, :, None] - key
        visible = ok & policy.admit(absolute[:, None, :, None], key)
        if spec.window is not None:
            visible = visible & (distance < spec.window)
        return distance, visible

    return mask_fn


@dataclass(frozen=True, kw_only=True)
class FreshTokens:
    """The fresh tokens of one layer; `queries` [B, K, G, T, H] and `positions` [B, T] by phase.

    There are more keys than queries where earlier calls left tokens pending.
    """

    policy: Policy
    spec: AttentionSpec
    ctx: StepContext
    items: Items
    queries: dict[str, Array]
    positions: dict[str, Array]

    def partial(self) -> Partial:
        """The softmax state of every query over the fresh keys that it sees."""
        found = None
        for phase, keys in self._parts():

            def block(q, distance, visible, keys=keys):
                k, v = self.items.k[:, :, :keys], self.items.v[:, :, :keys]
                return partial_attention(self.spec, q, k, v, distance, visible)

            partial = Partial(*self._over_blocks(phase, keys, 3, block))
            found = partial if found is None else merge(found, partial)
        assert found is not None
        return found

    def few(self) -> tuple[Array, Array] | None:
        """Scores f32[B, K, G, T, J], NEGATIVE where hidden, and values, if the keys are few and
        queries see all of them in one phase."""
        (phase, keys), *more = self._parts()
        if more or keys > FEW:
            return None

        def block(q, distance, visible):
            spec, k = self.spec, self.items.k
            if keys == 1:  # else XLA:GPU takes a launch to scale the product
                spec, q = replace(spec, scale=1.0), q.astype(jnp.float32) * spec.scale
            s = scores(spec, q, k, distance, "BKSH")
            return jnp.where(visible[:, :, None], s, NEGATIVE)

        return self._over_blocks(phase, keys, 3, block), self.items.v

    def key_weights(self, lse: Array) -> Array:
        """Probability that fresh keys receive, f32[B, K, Q, T]: per query (Q = T) in a tree, in a
        chain summed over the valid queries (Q = 1)."""
        size = self.items.v.shape[2]
        total = jnp.zeros((), jnp.float32)
        for phase, keys in self._parts():

            def block(q, distance, visible, lse, valid, keys=keys):
                attn_weight = key_weights(
                    self.spec, q, self.items.k[:, :, :keys], distance, visible, lse
                )
                attn_weight = jnp.where(valid[:, None, :, None], attn_weight, 0.0)
                return attn_weight if self.ctx.is_tree else attn_weight.sum(axis=2, keepdims=True)

            found = self._over_blocks(phase, keys, 2, block, (lse, 3), (self.ctx.valid, 1))
            if not self.ctx.is_tree:
                found = found.sum(axis=2, keepdims=True)
            total = total + jnp.pad(found, [(0, 0), (0, 0), (0, 0), (0, size - keys)])
        return total

    def last_key_weights(self, lse: Array, order: Array, valid: Array, rows: Rows) -> Array:
        """`key_weights` of a chain, f32[B, K, 1, T], counting only the queries `order` i32[B, W]
        where `valid`; `rows` takes them from an array."""
        size = self.items.v.shape[2]
        total = jnp.zeros((), jnp.float32)
        for phase, keys in self._parts():

            def block(q, distance, visible, lse, keys=keys):
                k = self.items.k[:, :, :keys]
                attn_weight = key_weights(self.spec, q, k, distance, visible, lse)
                return jnp.where(valid[:, None, :, None], attn_weight, 0.0)

            found = self._block(phase, keys, order, rows, block, (lse, 3))
            found = found.sum(axis=2, keepdims=True)
            total = total + jnp.pad(found, [(0, 0), (0, 0), (0, 0), (0, size - keys)])
        return total

    def _parts(self) -> list[tuple[QueryPhase, int]]:
        """(query phase, number of leading keys) of the parts that are seen alike."""
        size = self.items.v.shape[2]
        # A lone token is at distance 0 from itself in either phase.
        if self.policy.positions == "absolute" or self.policy.sinks == 0 or size == 1:
            return [("absolute", size)]
        sinks = size if self.ctx.is_tree else min(self.policy.sinks, size)
        return [("absolute", size), ("in_cache", sinks)]

    def _over_blocks(self, phase: QueryPhase, keys: int, axis: int, block: Callable, *more):
        """`block(q, distance, visible, *more)` over all queries, at most QUERY_BLOCK at a time.

        `more` are (array, axis of its queries), `axis` is that of the queries in the results.
        """
        size = self.ctx.valid.shape[1]

        def run(first, count: int):
            def rows(x: Array, axis: int) -> Array:
                return jax.lax.dynamic_slice_in_dim(x, first, count, axis)

            if count == size:
                rows = lambda x, axis: x  # noqa: E731
            order = first + jnp.arange(count)[None]
            return self._block(phase, keys, order, rows, block, *more)

        if size <= QUERY_BLOCK:
            return run(0, size)
        count, rest = divmod(size, QUERY_BLOCK)
        found = jax.lax.map(lambda i: run(i * QUERY_BLOCK, QUERY_BLOCK), jnp.arange(count))

        def join(x: Array) -> Array:
            x = jnp.moveaxis(x, 0, axis)
            return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

        found = jax.tree.map(join, found)
        if not rest:
            return found
        last = run(count * QUERY_BLOCK, rest)
        return jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=axis), found, last)

    def _block(self, phase: QueryPhase, keys: int, order: Array, rows: Rows, block, *more):
        """`block(q, distance, visible, *more)` of the queries `order` i32[B|1, Q], which
        `rows(x, axis)` takes from an array."""
        ctx = self.ctx
        k_pos = self.items.pos[:, :, :keys]
        pending = self.items.v.shape[2] - ctx.valid.shape[1]
        valid = jnp.pad(ctx.valid, [(0, 0), (pending, 0)], constant_values=True)[:, None, :keys]
        if ctx.visible is None:
            visible = order[:, :, None] >= jnp.arange(keys)
        else:
            visible = rows(ctx.visible, 1)[:, :, :keys]
        visible = (visible & valid)[:, None]
        if len(self._parts()) > 1:
            is_sink = (k_pos < self.policy.sinks)[:, :, None]
            visible = visible & (is_sink if phase == "in_cache" else ~is_sink)
        absolute, own = rows(self.positions["absolute"], 1), rows(self.positions[phase], 1)
        distance, visible = make_mask_fn(self.policy, self.spec, absolute, own)(k_pos, visible)
        q = rows(self.queries[phase], 3)
        return block(q, distance, visible, *(rows(x, axis) for x, axis in more))
