"""Attention over selected heads for the Triton back end.

A program owns one (row, key/value head) and one part of the slots below the row's length; the parts
are merged outside. It looks for its head in the row's list. Not there, its part is empty and it
writes the identity: so every output is written without a scatter, and nothing else is read.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.attention_tile import (
    load_matrix,
    partials,
    store_matrix,
)
from pallas_kernels.common import exact_dot, launch, load, store
from pallas_kernels.merge_splits import merge_splits
from pallas_kernels.shapes import power_of_two
from pallas_kernels.softmax_state import NEGATIVE
from pallas_kernels.sparse_heads.configs import Config


def sparse_heads(q, k, v, length, groups, count, *, config: Config, interpret, scale):
    batch, heads, rows, width = q.shape
    parts = launch(
        functools.partial(_kernel, config=config, scale=scale),
        q, k, v, length, groups, count,
        out=partials(batch, heads, config.splits, rows, width),
        grid=(batch * heads, config.splits), name="sparse_heads",
        warps=config.warps, stages=config.stages, interpret=interpret,
    )  # fmt: skip
    return merge_splits(*parts, interpret=interpret)


def _kernel(
    q_ref, k_ref, v_ref, length_ref, groups_ref, count_ref, acc_ref, max_ref, sum_ref,
    *, config, scale,
):  # fmt: skip
    _, heads, rows, width = q_ref.shape
    b, h = pl.program_id(0) // heads, pl.program_id(0) % heads
    split = pl.program_id(1)
    stop = jnp.where(
        _is_listed(groups_ref, count_ref, b, h), jnp.minimum(length_ref[b], k_ref.shape[2]), 0
    )
    tiles = (stop + config.keys - 1) // config.keys
    part = (tiles + config.splits - 1) // config.splits
    first = split * part

    row = jnp.arange(power_of_two(rows, least=16))  # what the matrix unit needs
    exists = row < rows
    q = load_matrix(q_ref, (b, h), row, exists & (stop > 0))

    def body(i, carry):
        acc, largest, total = carry
        slot = i * config.keys + jnp.arange(config.keys)
        inside = slot < stop
        k = load_matrix(k_ref, (b, h), slot, inside)
        s = jnp.where(inside[None], exact_dot(q, k.T) * scale, NEGATIVE)
        new = jnp.maximum(largest, jnp.max(s, axis=1))
        p = jnp.where(inside[None], jnp.exp(s - new[:, None]), 0.0)
        old = jnp.exp(largest - new)
        v = load_matrix(v_ref, (b, h), slot, inside)
        return (
            acc * old[:, None] + exact_dot(p.astype(v.dtype), v),
            new,
            total * old + jnp.sum(p, axis=1),
        )

    empty = (
        jnp.zeros((len(row), power_of_two(width, least=16)), jnp.float32),
        jnp.full((len(row),), NEGATIVE, jnp.float32),
        jnp.zeros((len(row),), jnp.float32),
    )
    acc, largest, total = jax.lax.fori_loop(first, jnp.minimum(first + part, tiles), body, empty)
    store_matrix(acc_ref, (b, h, split), row, exists, acc)
    store(max_ref.at[b, h, split, row], largest, mask=exists)
    store(sum_ref.at[b, h, split, row], total, mask=exists)


def _is_listed(groups_ref, count_ref, b, h):
    """Whether head `h` stands in the live part of row b's list."""
    entries = groups_ref.shape[1]
    entry = jnp.arange(power_of_two(entries))
    live = entry < jnp.minimum(count_ref[b], entries)
    head = load(groups_ref.at[b, entry], mask=live, other=-1)
    return jnp.max(jnp.where(head == h, 1, 0)) > 0
