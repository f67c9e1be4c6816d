"""quantize_pack for the Triton back end: a program owns some tokens of one run, row and head."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.common import launch, load, store
from pallas_kernels.quantize_pack.configs import Config
from pallas_kernels.shapes import blocks_of


def quantize_pack(
    words, scale, zero, x, index, *, bits: int, group: int, axis: int, config: Config,
    interpret: bool,
):  # fmt: skip
    batch, heads, tokens, _ = x.shape
    runs = index.shape[1]
    run = tokens // runs
    part = group if axis == 2 else min(run, config.tokens)
    kernel = functools.partial(
        _key_kernel if axis == 2 else _value_kernel, bits=bits, group=group, run=run, part=part
    )
    return launch(
        kernel, words, scale, zero, x, index,
        out=tuple(jax.ShapeDtypeStruct(y.shape, y.dtype) for y in (words, scale, zero)),
        grid=(batch * heads, runs, blocks_of(run, part)),
        name="quantize_pack", warps=config.warps, stages=config.stages, interpret=interpret,
        aliases={0: 0, 1: 1, 2: 2},
    )  # fmt: skip


def _place(x_ref, index_ref, run: int, part: int):
    """Row, head, the first token to read, and the first one to write (negative: none)."""
    heads = x_ref.shape[1]
    b, h = pl.program_id(0) // heads, pl.program_id(0) % heads
    target = load(index_ref.at[b, pl.program_id(1)])
    inside = pl.program_id(2) * part
    return b, h, pl.program_id(1) * run + inside, target, target * run + inside


def _key_kernel(*refs, bits, group, run, part):
    _, _, _, x_ref, index_ref, words_ref, scale_ref, _ = refs
    b, h, source, target, first = _place(x_ref, index_ref, run, part)

    @pl.when((target >= 0) & (first + part <= words_ref.shape[2] * (32 // bits)))
    def _():
        channels = jnp.arange(x_ref.shape[3])
        x = load(x_ref.at[b, h, (source + jnp.arange(group))[:, None], channels[None]])
        coded = quantized(x, bits, 0, scale_ref.dtype)
        put_keys(refs[5:], (b, h), first, channels, *coded, bits)


def _value_kernel(*refs, bits, group, run, part):
    _, _, _, x_ref, index_ref, words_ref, scale_ref, _ = refs
    b, h, source, target, first = _place(x_ref, index_ref, run, part)

    @pl.when((target >= 0) & (first + part <= words_ref.shape[2]))
    def _():
        token = jnp.arange(part)
        for m in range(x_ref.shape[3] // group):
            channels = m * group + jnp.arange(group)
            x = load(x_ref.at[b, h, (source + token)[:, None], channels[None]])
            parts, coded = jnp.full_like(token, m), quantized(x, bits, 1, scale_ref.dtype)
            put_values(refs[5:], (b, h), first + token, parts, *coded, bits)


def put_keys(refs, at, first, channels, codes, scale, zero, bits: int):
    """Stores what `quantized` made of one group of tokens and those channels: into the words,
    scales and zeros of the row and head `at`, from the token `first` on."""
    (group, width), count = codes.shape, 32 // bits
    words = packed(codes.reshape(group // count, count, width), bits, 1)
    row = first // count + jnp.arange(group // count)
    store(refs[0].at[(*at, row[:, None], channels[None])], words)
    for ref, x in zip(refs[1:], (scale, zero), strict=True):
        store(ref.at[(*at, first // group, channels)], x)


def put_values(refs, at, tokens, parts, codes, scale, zero, bits: int):
    """The same of group `parts[i]` of the channels of token `tokens[i]`, for every i."""
    (rows, group), count = codes.shape, 32 // bits
    words = packed(codes.reshape(rows, group // count, count), bits, 2)
    column = parts[:, None] * (group // count) + jnp.arange(group // count)[None]
    store(refs[0].at[(*at, tokens[:, None], column)], words)
    for ref, x in zip(refs[1:], (scale, zero), strict=True):
        store(ref.at[(*at, tokens, parts)], x)


def quantized(x, bits: int, axis: int, dtype):
    """Codes of `x` with scale and zero of each group along `axis`, as the reference computes them,
    in the same order of operations."""
    x = x.astype(jnp.float32)
    low, high = jnp.min(x, axis=axis), jnp.max(x, axis=axis)
    levels, limit = 2**bits - 1, float(jnp.finfo(dtype).max)
    zero = jnp.clip(low, -limit, limit).astype(dtype)
    scale = jnp.clip((high - low) * jnp.float32(1 / levels), -limit, limit).astype(dtype)
    step, base = (jnp.expand_dims(y.astype(jnp.float32), axis) for y in (scale, zero))
    codes = _rounded((x - base) / jnp.where(step > 0, step, 1.0))
    codes = jnp.where(step > 0, jnp.clip(codes, 0, levels), 0.0)
    return codes.astype(jnp.int32).astype(jnp.uint32), scale, zero


def _rounded(x):
    """To the nearest integer, halves to the even one: `jnp.round` has no lowering to Triton."""
    below = jnp.floor(x)
    rest, odd = x - below, below - 2 * jnp.floor(below / 2)
    return below + ((rest > 0.5) | ((rest == 0.5) & (odd == 1))).astype(x.dtype)


def packed(codes, bits: int, axis: int):
    """Words of the codes along `axis` of 3, which has those of one word."""
    shape = [1, 1, 1]
    shape[axis] = 32 // bits
    shifts = (bits * jnp.arange(32 // bits, dtype=jnp.uint32)).reshape(shape)
    return jnp.sum(codes << shifts, axis=axis, dtype=jnp.uint32)
