"""SnapKV (arXiv 2404.14469): a prompt is cut to the tokens that its last queries attend to.

After each prompt, with what earlier turns left, every head keeps its last `window` tokens and those
to which the window's queries give most (algorithm 1 there, averaged over `pool` neighbours),
`budget` in all. Generated tokens are appended: decoding evicts nothing and weighs nothing. Bytes
per row and layer for C = budget + new slots: `2 K H C * itemsize + 4 K C`.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from jaxinfer.cache import (
    DenseSegment,
    Policy,
    Tier,
    items_at,
    new_slots,
    put,
    slot_bytes,
    stored_items,
    write_index,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Snap(Tier):
    """`budget` tokens of prompts and room for `new` generated ones; empty slots have position -1"""

    budget: int
    new: int
    window: int
    pool: int

    def room(self, capacity, prompt):
        return self.budget + self.new - min(prompt, self.budget)

    def init(self, geometry, batch):
        slots = new_slots(geometry, batch, self.budget + self.new)
        shape = (batch, geometry.num_kv_heads, slots.capacity)
        return replace(slots, pos=jnp.full(shape, -1, jnp.int32))

    def segments(self, state, aux, n_in):
        ok, stop = state.pos >= 0, jnp.max(self._held(state))
        return (DenseSegment(slots=state, pos=state.pos, ok=ok, stop=stop, in_order=False),)

    def push(self, state, aux, items, ctx):
        held, order = self._held(state), jnp.arange(items.v.shape[2], dtype=jnp.int32)
        entering, slot = order < ctx.count[:, None], held[:, None] + order
        if ctx.is_prompt:
            items, kept = self._cut(state, items, ctx, held)
            order = jnp.arange(items.v.shape[2], dtype=jnp.int32)
            entering, slot = order < jnp.where(ctx.count > 0, kept, 0)[:, None], order[None]
            gone = (ctx.count > 0)[:, None, None]
            state = replace(state, pos=jnp.where(gone, -1, state.pos))
        index = jnp.where(entering, slot, state.capacity)
        index = write_index(index, state.capacity, ctx.after, items.k, items.v)
        return put(state, items, index), None, jnp.zeros_like(held)

    def bytes_per_row(self, geometry):
        slots = self.budget + self.new
        return slot_bytes(geometry, slots) + 4 * geometry.num_kv_heads * slots

    def _held(self, state):
        return (state.pos[:, 0] >= 0).sum(axis=-1, dtype=jnp.int32)  # alike in all heads

    def _cut(self, state, items, ctx, held):
        """The tokens that stay, in order, and how many they are."""
        stored = stored_items(state)
        given = ctx.stored_weights[0] if ctx.stored_weights else jnp.zeros(stored.pos.shape)
        fresh = jnp.arange(items.v.shape[2]) < ctx.count[:, None, None]
        pos = jnp.where(fresh, items.pos, -1)
        items = replace(items, pos=jnp.broadcast_to(pos, items.v.shape[:3]))
        both = jax.tree.map(
            lambda x, y: jnp.concatenate([x, y.astype(x.dtype)], axis=2),
            replace(stored, attn_weight=given), items,
        )  # fmt: skip
        edges = [(0, 0), (0, 0), (self.pool // 2, (self.pool - 1) // 2)]
        padded, width = jnp.pad(both.attn_weight, edges), both.pos.shape[2]
        score = sum(padded[..., i : i + width] for i in range(self.pool))
        recent = both.pos >= (ctx.length + ctx.count - self.window)[:, None, None]
        score = jnp.where(both.pos < 0, -jnp.inf, jnp.where(recent, jnp.inf, score))
        best, index = jax.lax.top_k(score, min(self.budget, width))
        index = jnp.sort(jnp.where(best > -jnp.inf, index, width - 1), axis=-1)
        return items_at(both, index), jnp.minimum(held + ctx.count, self.budget)


def snapkv(budget: int = 1024, new: int = 1024, window: int = 32, pool: int = 5) -> Policy:
    """Prompts cut to `budget` tokens a head, and room for `new` generated ones in each turn."""
    return Policy(
        name="snapkv",
        tiers=(Snap(budget=budget, new=new, window=window, pool=pool),),
        prompt="whole",
        weigh_keys="prompt",
        query_window=window,
        chunk_invariant=False,
    )
