"""Attention over packed codes for the Triton back end.

What bounds it at 2 bits is not memory but arithmetic: a token's key and value are 2 H codes of a
few instructions each. Three things keep those few:

- A code becomes a number without a conversion, which runs at a sixteenth of the rate of other
  instructions: its bits go into the mantissa of 1.0, which gives 1 + code / 2**bits exactly.
- Scale and minimum of keys are folded into the query, once per group of tokens:
  q . k = sum_d (q_d s_d 2**bits) (1 + c_d / 2**bits) - sum_d q_d s_d 2**bits + sum_d q_d z_d.
- Those of values are folded into the probabilities, once per group of channels.

A program owns one (row, key/value head), one tile of its G * T queries and one part of the tokens;
an iteration is one key group, or 64 tokens of it.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.attention_tile import (
    Scores,
    load_matrix,
    partials,
)
from pallas_kernels.common import blocks_of, exact_dot, launch, load, store
from pallas_kernels.kivi_attention.configs import Config
from pallas_kernels.merge_splits import joined
from pallas_kernels.softmax_state import NEGATIVE

MOST_TOKENS = 64  # of an iteration


def kivi_attention(
    q, k_words, k_scale, k_zero, v_words, v_scale, v_zero, visible, distance, stop, rest,
    *, key_bits: int, value_bits: int, config: Config, interpret: bool, scale, softcap, slopes,
):  # fmt: skip
    batch, heads, groups, size, width = q.shape
    rows, splits = groups * size, config.splits
    extra = () if slopes is None else (distance, jnp.asarray(slopes, jnp.float32))
    kernel = functools.partial(
        _kernel, key_bits=key_bits, value_bits=value_bits, config=config, size=size,
        groups=groups, scale=scale, softcap=softcap,
    )  # fmt: skip
    parts = launch(
        kernel, q.reshape(batch, heads, rows, width), k_words, k_scale, k_zero, v_words, v_scale,
        v_zero, visible.astype(jnp.int8), stop, *extra,
        out=partials(batch, heads, splits, rows, width),
        grid=(batch * heads, blocks_of(rows, config.rows), splits),
        name="kivi_attention", warps=config.warps, stages=config.stages, interpret=interpret,
    )  # fmt: skip
    return joined(parts, rest, q, interpret=interpret)


def _kernel(
    q_ref, kw_ref, ks_ref, kz_ref, vw_ref, vs_ref, vz_ref, visible_ref, stop_ref, *refs,
    key_bits, value_bits, config, size, groups, scale, softcap,
):  # fmt: skip
    *alibi, acc_ref, peak_ref, norm_ref = refs
    heads, width = q_ref.shape[1], q_ref.shape[3]
    b, h = pl.program_id(0) // heads, pl.program_id(0) % heads
    split = pl.program_id(2)
    key_words, value_words = 32 // key_bits, 32 // value_bits
    key_group = kw_ref.shape[2] * key_words // ks_ref.shape[2]
    value_group = width // vs_ref.shape[3]
    tokens = min(key_group, MOST_TOKENS)  # of an iteration
    slots_in_all = visible_ref.shape[3]
    stop = jnp.minimum(stop_ref[b], slots_in_all)
    scores = Scores(
        visible=visible_ref, alibi=alibi, groups=groups, size=size, scale=scale, softcap=softcap
    )
    rows = pl.program_id(1) * config.rows + jnp.arange(config.rows)
    exists = rows < q_ref.shape[2]
    q = load_matrix(q_ref, (b, h), rows, exists)
    tiles = (stop + tokens - 1) // tokens
    part = (tiles + config.splits - 1) // config.splits  # of what is live, not of the capacity
    last = jnp.minimum((split + 1) * part, tiles)
    channels = jnp.arange(width)

    def products(i):
        row = i * (tokens // key_words) + jnp.arange(tokens // key_words)
        known = (row * key_words < stop)[:, None]
        words = load(kw_ref.at[b, h, row[:, None], channels[None]], mask=known, other=0)
        numbers, unit, offset = as_numbers(words, key_bits, 1, q.dtype)
        group = i * tokens // key_group
        s = load(ks_ref.at[b, h, group, channels]).astype(jnp.float32)
        z = load(kz_ref.at[b, h, group, channels]).astype(jnp.float32)
        folded = (q.astype(jnp.float32) * (s * unit)[None]).astype(q.dtype)
        constant = jnp.sum(q.astype(jnp.float32) * z[None], axis=1)
        constant = constant - offset * jnp.sum(folded.astype(jnp.float32), axis=1)
        return exact_dot(folded, numbers.reshape(tokens, width).T) + constant[:, None]

    def body(i, carry):
        *acc, peak, norm = carry
        slots = i * tokens + jnp.arange(tokens)
        inside = slots < stop
        s, seen = scores.of(products(i), b, h, rows, exists, slots, inside)
        new = jnp.maximum(peak, jnp.max(s, axis=1))
        p = jnp.where(seen, jnp.exp(s - new[:, None]), 0.0)
        old = jnp.exp(peak - new)
        for m in range(len(acc)):
            acc[m] = acc[m] * old[:, None] + weighted(m, p, slots, inside)
        return *acc, new, norm * old + jnp.sum(p, axis=1)

    def weighted(m, p, slots, inside):
        """The values of channel group `m`, weighted by p f32[rows, tokens]."""
        column = m * (value_group // value_words) + jnp.arange(value_group // value_words)
        words = load(vw_ref.at[b, h, slots[:, None], column[None]], mask=inside[:, None], other=0)
        numbers, unit, offset = as_numbers(words, value_bits, 2, q.dtype)
        s = load(vs_ref.at[b, h, slots, m], mask=inside, other=0.0).astype(jnp.float32)
        z = load(vz_ref.at[b, h, slots, m], mask=inside, other=0.0).astype(jnp.float32)
        folded = (p * (s * unit)[None]).astype(q.dtype)
        constant = jnp.sum(p * z[None], axis=1) - offset * jnp.sum(
            folded.astype(jnp.float32), axis=1
        )
        return exact_dot(folded, numbers.reshape(tokens, value_group)) + constant[:, None]

    empty = jnp.zeros((config.rows, value_group), jnp.float32)
    *acc, peak, norm = jax.lax.fori_loop(
        split * part, last, body,
        (
            *([empty] * (width // value_group)),
            jnp.full((config.rows,), NEGATIVE, jnp.float32),
            jnp.zeros((config.rows,), jnp.float32),
        ),
    )  # fmt: skip
    for m, values in enumerate(acc):
        columns = m * value_group + jnp.arange(value_group)
        store(
            acc_ref.at[b, h, split, rows[:, None], columns[None]], values,
            mask=jnp.broadcast_to(exists[:, None], values.shape),
        )  # fmt: skip
    store(peak_ref.at[b, h, split, rows], peak, mask=exists)
    store(norm_ref.at[b, h, split, rows], norm, mask=exists)


def as_numbers(words, bits: int, axis: int, dtype):
    """The codes of `words` along a new axis, as numbers v with code = unit * (v - offset)."""
    shape = [1, 1, 1]
    shape[axis] = 32 // bits
    shifts = (bits * jnp.arange(32 // bits, dtype=jnp.uint32)).reshape(shape)
    codes = (jnp.expand_dims(words, axis) >> shifts) & jnp.uint32(2**bits - 1)
    if dtype == jnp.bfloat16 and bits < 8:  # 7 bits of mantissa
        pattern = (codes << jnp.uint32(7 - bits)) | jnp.uint32(0x3F80)
        numbers = jax.lax.bitcast_convert_type(pattern.astype(jnp.uint16), jnp.bfloat16)
        return numbers, float(2**bits), 1.0
    pattern = (codes << jnp.uint32(23 - bits)) | jnp.uint32(0x3F800000)
    numbers = jax.lax.bitcast_convert_type(pattern, jnp.float32)
    if dtype == jnp.float32:
        return numbers, float(2**bits), 1.0
    return ((numbers - 1.0) * float(2**bits)).astype(dtype), 1.0, 0.0
