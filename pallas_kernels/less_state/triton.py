"""LESS's low-rank state for the Triton back end.

A program owns one head and some of its queries or keys, of several rows of the batch: a head's
weights are by far the most that a decode step reads here, and all rows share them.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.activation import gelu
from pallas_kernels.common import exact_dot, launch, load, store
from pallas_kernels.less_state.configs import Config
from pallas_kernels.shapes import blocks_of, power_of_two
from pallas_kernels.softmax_state import NEGATIVE, Partial

ELEMENTS = 4096  # of the state in registers at a time; at 8192 an H200 spills (R 16, H 128)


def low_rank_read(q, num, den, inner, outer, *, config: Config, interpret):
    batch, heads, groups, size, width = q.shape
    shape = jax.ShapeDtypeStruct(q.shape, jnp.float32)
    numbers = jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32)
    state = launch(
        functools.partial(_read_kernel, config=config), q, num, den, inner, outer,
        out=(shape, numbers, numbers),
        grid=(heads * groups, blocks_of(batch * size, config.rows)),
        name="low_rank_read", warps=config.warps, stages=config.stages, interpret=interpret,
    )  # fmt: skip
    return Partial(*state)


def low_rank_update(num, den, k, v, count, *weights, config: Config, interpret):
    batch, heads, size, _ = k.shape
    tokens = min(power_of_two(size), config.rows)
    return launch(
        functools.partial(_update_kernel, config=config, tokens=tokens),
        num, den, k, v, count, *weights,
        out=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (num, den)),
        grid=(heads, blocks_of(batch, config.rows // tokens)),
        name="low_rank_update", warps=config.warps, stages=config.stages, interpret=interpret,
        aliases={0: 0, 1: 1},
    )  # fmt: skip


def _read_kernel(
    q_ref, num_ref, den_ref, inner_ref, outer_ref, acc_ref, max_ref, sum_ref, *, config
):
    batch, _, groups, size, width = q_ref.shape
    head, rank = pl.program_id(0), num_ref.shape[2]
    k, g = head // groups, head % groups
    row = pl.program_id(1) * config.rows + jnp.arange(config.rows)
    b, t, inside = row // size, row % size, row < batch * size
    columns = jnp.arange(power_of_two(width, least=16))
    mask = inside[:, None] & (columns < width)[None]
    at_q = (b[:, None], k, g, t[:, None], columns[None])
    q = load(q_ref.at[at_q], mask=mask, other=0.0)
    phi = jnp.abs(_two_layers(q, inner_ref, outer_ref, head, config))
    total = jnp.zeros(row.shape, jnp.float32)
    acc = jnp.zeros(mask.shape, jnp.float32)
    for ranks in _groups(rank, mask.shape):
        known = ranks < rank
        weight = _columns(phi, ranks)
        at = (b[:, None], k, ranks[None])
        total += jnp.sum(
            weight * load(den_ref.at[at], mask=inside[:, None] & known[None], other=0.0), axis=1
        )
        at = (b[:, None, None], k, ranks[None, :, None], columns[None, None])
        values = load(num_ref.at[at], mask=mask[:, None] & known[None, :, None], other=0.0)
        acc += jnp.sum(weight[:, :, None] * values, axis=1)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    store(acc_ref.at[at_q], jnp.where(some[:, None], acc / total[:, None], 0.0), mask=mask)
    store(max_ref.at[b, k, g, t], jnp.where(some, jnp.log(total), NEGATIVE), mask=inside)
    store(sum_ref.at[b, k, g, t], some.astype(jnp.float32), mask=inside)


def _update_kernel(
    _, __, k_ref, v_ref, count_ref, inner_ref, outer_ref, mix_ref, scale_ref, mix_scale_ref,
    num_ref, den_ref, *, config, tokens,
):  # fmt: skip
    batch, _, size, width = k_ref.shape
    head, rank, rows = pl.program_id(0), num_ref.shape[2], config.rows // tokens
    first = pl.program_id(1) * rows
    own = first + jnp.arange(rows)  # the rows of the batch whose state this program holds
    columns = jnp.arange(power_of_two(width, least=16))
    ranks = jnp.arange(power_of_two(rank, least=16))
    known, square = ranks < rank, (ranks < rank)[:, None] & (ranks < rank)[None]
    most = jnp.max(load(count_ref.at[own], mask=own < batch, other=0))
    row = first + jnp.arange(config.rows) // tokens
    count = load(count_ref.at[row], mask=row < batch, other=0)

    def absorb(i, carry):
        a = i * tokens + jnp.arange(config.rows) % tokens
        mask = ((a < count) & (a < size))[:, None] & (columns < width)[None]
        at = (row[:, None], head, a[:, None], columns[None])
        k = load(k_ref.at[at], mask=mask, other=0.0)  # psi(0) is 0: what is masked adds nothing
        v = load(v_ref.at[at], mask=mask, other=0.0).astype(jnp.float32)
        scale = load(scale_ref.at[head, ranks], mask=known, other=0.0)
        mix_scale = load(mix_scale_ref.at[head, ranks], mask=known, other=0.0)
        mix = load(mix_ref.at[head, ranks[:, None], ranks[None]], mask=square, other=0.0)
        u = _two_layers(k, inner_ref, outer_ref, head, config) * jnp.abs(scale)[None]
        psi = jnp.abs(u + exact_dot(u, mix) * mix_scale[None])
        # Read, add, write: the products above keep the threads of one pass behind the last one's.
        for some in _groups(rank, mask.shape):
            weight = _columns(psi, some)
            gain = _rows_of(weight[:, :, None] * v[:, None], rows, tokens)
            state = (own < batch)[:, None] & (some < rank)[None]
            place = den_ref.at[own[:, None], head, some[None]]
            old = load(place, mask=state, other=0.0)
            store(place, old + _rows_of(weight, rows, tokens), mask=state)
            state = state[:, :, None] & (columns < width)[None, None]
            place = num_ref.at[own[:, None, None], head, some[None, :, None], columns[None, None]]
            store(place, load(place, mask=state, other=0.0) + gain, mask=state)
        return carry

    jax.lax.fori_loop(0, (jnp.minimum(most, size) + tokens - 1) // tokens, absorb, None)


def _two_layers(x, inner_ref, outer_ref, head, config: Config):
    """gelu(gelu(x inner) outer), f32[rows, R padded]; what is padded is 0."""
    _, width, hidden = inner_ref.shape
    rank = outer_ref.shape[2]
    columns, ranks = jnp.arange(x.shape[1]), jnp.arange(power_of_two(rank, least=16))
    x = x.astype(jnp.float32)

    def body(i, total):
        e = i * config.hidden + jnp.arange(config.hidden)
        inner = load(
            inner_ref.at[head, columns[:, None], e[None]],
            mask=(columns < width)[:, None] & (e < hidden)[None], other=0.0,
        ).astype(jnp.float32)  # fmt: skip
        outer = load(
            outer_ref.at[head, e[:, None], ranks[None]],
            mask=(e < hidden)[:, None] & (ranks < rank)[None], other=0.0,
        ).astype(jnp.float32)  # fmt: skip
        return total + exact_dot(gelu(exact_dot(x, inner)), outer)

    zero = jnp.zeros((x.shape[0], ranks.shape[0]), jnp.float32)
    return gelu(jax.lax.fori_loop(0, blocks_of(hidden, config.hidden), body, zero))


def _groups(rank: int, shape: tuple[int, int]) -> list[jax.Array]:
    """The ranks, as many at a time as stay in registers next to a tile of `shape`."""
    size = min(power_of_two(rank), max(ELEMENTS // (shape[0] * shape[1]), 1))
    return [first + jnp.arange(size) for first in range(0, rank, size)]


def _columns(x, which):
    """`x[:, which]`; Triton has no slices of what is in registers."""
    chosen = jnp.arange(x.shape[1])[None, :, None] == which[None, None]
    return jnp.sum(jnp.where(chosen, x[:, :, None], 0.0), axis=1)


def _rows_of(x, rows: int, tokens: int):
    """The sum over the tokens of each row of the batch."""
    return x if tokens == 1 else jnp.sum(x.reshape(rows, tokens, *x.shape[1:]), axis=1)
