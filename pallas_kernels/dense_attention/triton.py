"""Dense attention for the Triton back end.

A program owns one (row, key/value head), one tile of its G * T queries and one part of the slots;
the parts are merged outside. The loop ends at the row's `stop`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.attention_tile import (
    Scores,
    ends,
    load_matrix,
    partials,
    store_matrix,
)
from pallas_kernels.common import exact_dot, launch, load, store
from pallas_kernels.dense_attention.configs import Config
from pallas_kernels.merge_splits import joined
from pallas_kernels.shapes import blocks_of, power_of_two
from pallas_kernels.softmax_state import NEGATIVE


def dense_attention(
    q, k, v, visible, distance, stop, extra, *, config: Config, interpret: bool, scale, softcap,
    slopes,
):  # fmt: skip
    batch, heads, groups, size, width = q.shape
    rows, splits = groups * size, config.splits
    kernel = functools.partial(
        _partial_kernel, config=config, size=size, groups=groups, scale=scale, softcap=softcap
    )
    parts = launch(
        kernel, q.reshape(batch, heads, rows, width), k, v, visible.astype(jnp.int8),
        ends(stop, batch, k.shape[2]), *_extra(distance, slopes),
        out=partials(batch, heads, splits, rows, width),
        grid=(batch * heads, blocks_of(rows, config.rows), splits),
        name="dense_attention", warps=config.warps, stages=config.stages, interpret=interpret,
    )  # fmt: skip
    return joined(parts, extra, q, interpret=interpret)


def key_weights(
    q, k, visible, lse, distance, stop, *, config: Config, interpret: bool, scale, softcap, slopes
):
    batch, heads, _, size, _ = q.shape
    slots, nodes = k.shape[2], min(power_of_two(size, least=16), config.rows)
    kernel = functools.partial(
        _weights_kernel, config=config, nodes=nodes, scale=scale, softcap=softcap
    )
    return launch(
        kernel, q, k, visible.astype(jnp.int8), lse, ends(stop, batch, slots),
        *_extra(distance, slopes),
        out=jax.ShapeDtypeStruct((batch, heads, size, slots), jnp.float32),
        grid=(batch * heads, blocks_of(size, nodes), blocks_of(slots, config.keys)),
        name="key_weights", warps=config.warps, stages=config.stages, interpret=interpret,
    )  # fmt: skip


def _extra(distance, slopes):
    """The operands that only ALiBi has."""
    return () if slopes is None else (distance, jnp.asarray(slopes, jnp.float32))


def _partial_kernel(
    q_ref, k_ref, v_ref, visible_ref, stop_ref, *refs, config, size, groups, scale, softcap
):
    *alibi, acc_ref, max_ref, sum_ref = refs
    scores = Scores(
        visible=visible_ref, alibi=alibi, groups=groups, size=size, scale=scale, softcap=softcap
    )
    heads, slots_in_all, width = k_ref.shape[1:]
    b, h, split = pl.program_id(0) // heads, pl.program_id(0) % heads, pl.program_id(2)
    rows = pl.program_id(1) * config.rows + jnp.arange(config.rows)
    exists = rows < q_ref.shape[2]
    q = load_matrix(q_ref, (b, h), rows, exists)
    stop = jnp.minimum(stop_ref[b], slots_in_all)
    tiles = (stop + config.keys - 1) // config.keys
    part = (tiles + config.splits - 1) // config.splits  # of what is live, not of the capacity
    last = jnp.minimum((split + 1) * part, tiles)

    def body(i, carry):
        acc, largest, total = carry
        slots = i * config.keys + jnp.arange(config.keys)
        inside = slots < stop
        k = load_matrix(k_ref, (b, h), slots, inside).astype(q.dtype)
        s, seen = scores.of(exact_dot(q, k.T), b, h, rows, exists, slots, inside)
        new = jnp.maximum(largest, jnp.max(s, axis=1))
        p = jnp.where(seen, jnp.exp(s - new[:, None]), 0.0)
        old = jnp.exp(largest - new)
        v = load_matrix(v_ref, (b, h), slots, inside).astype(q.dtype)
        acc = acc * old[:, None] + exact_dot(p.astype(v.dtype), v)
        return acc, new, total * old + jnp.sum(p, axis=1)

    acc, largest, total = jax.lax.fori_loop(
        split * part, last, body,
        (
            jnp.zeros((config.rows, power_of_two(width, least=16)), jnp.float32),
            jnp.full((config.rows,), NEGATIVE, jnp.float32),
            jnp.zeros((config.rows,), jnp.float32),
        ),
    )  # fmt: skip
    store_matrix(acc_ref, (b, h, split), rows, exists, acc)
    store(max_ref.at[b, h, split, rows], largest, mask=exists)
    store(sum_ref.at[b, h, split, rows], total, mask=exists)


def _weights_kernel(
    q_ref, k_ref, visible_ref, lse_ref, stop_ref, *refs, config, nodes, scale, softcap
):
    """A program sums over the heads of a group, one after the other: what leaves it is as small as
    can be."""
    *alibi, weight_ref = refs
    heads, slots_in_all, groups, size = *k_ref.shape[1:3], *q_ref.shape[2:4]
    scores = Scores(
        visible=visible_ref, alibi=alibi, groups=groups, size=size, scale=scale, softcap=softcap
    )
    b, h = pl.program_id(0) // heads, pl.program_id(0) % heads
    node = pl.program_id(1) * nodes + jnp.arange(nodes)
    exists = node < size
    slots = pl.program_id(2) * config.keys + jnp.arange(config.keys)
    inside = slots < jnp.minimum(stop_ref[b], slots_in_all)
    k = load_matrix(k_ref, (b, h), slots, inside).astype(q_ref.dtype)

    def body(g, attn_weight):
        q = load_matrix(q_ref, (b, h, g), node, exists)
        rows = g * size + node
        s, seen = scores.of(exact_dot(q, k.T), b, h, rows, exists, slots, inside)
        lse = load(lse_ref.at[b, h, g, node], mask=exists, other=0.0)
        return attn_weight + jnp.where(seen, jnp.exp(s - lse[:, None]), 0.0)

    attn_weight = jax.lax.fori_loop(0, groups, body, jnp.zeros((nodes, config.keys), jnp.float32))
    store(
        weight_ref.at[b, h, node[:, None], slots[None]], attn_weight,
        mask=exists[:, None] & (slots < slots_in_all)[None],
    )  # fmt: skip
