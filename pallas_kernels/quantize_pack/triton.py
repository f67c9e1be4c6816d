"""quantize_pack for the Triton back end: a program owns some tokens of one run, row and head."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.common import blocks_of, launch, load, store
from pallas_kernels.quantize_pack.configs import Config


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
    _, _, _, x_ref, index_ref, words_ref, scale_ref, zero_ref = refs
    width, count = x_ref.shape[3], 32 // bits
    b, h, source, target, first = _place(x_ref, index_ref, run, part)

    @pl.when((target >= 0) & (first + part <= words_ref.shape[2] * count))
    def _():
        channels = jnp.arange(width)
        x = load(x_ref.at[b, h, (source + jnp.arange(group))[:, None], channels[None]])
        codes, scale, zero = _codes(x, bits, 0, scale_ref.dtype)
        words = _words(codes.reshape(group // count, count, width), bits, 1)
        row = first // count + jnp.arange(group // count)
        store(words_ref.at[b, h, row[:, None], channels[None]], words)
        store(scale_ref.at[b, h, first // group, channels], scale)
        store(zero_ref.at[b, h, first // group, channels], zero)


def _value_kernel(*refs, bits, group, run, part):
    _, _, _, x_ref, index_ref, words_ref, scale_ref, zero_ref = refs
    width, count = x_ref.shape[3], 32 // bits
    b, h, source, target, first = _place(x_ref, index_ref, run, part)

    @pl.when((target >= 0) & (first + part <= words_ref.shape[2]))
    def _():
        token = jnp.arange(part)
        for m in range(width // group):
            channels = m * group + jnp.arange(group)
            x = load(x_ref.at[b, h, (source + token)[:, None], channels[None]])
            codes, scale, zero = _codes(x, bits, 1, scale_ref.dtype)
            words = _words(codes.reshape(part, group // count, count), bits, 2)
            column = m * (group // count) + jnp.arange(group // count)
            row = first + token
            store(words_ref.at[b, h, row[:, None], column[None]], words)
            store(scale_ref.at[b, h, row, m], scale)
            store(zero_ref.at[b, h, row, m], zero)


def _codes(x, bits: int, axis: int, dtype):
    """As the reference computes them, in the same order of operations."""
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


def _words(codes, bits: int, axis: int):
    shape = [1, 1, 1]
    shape[axis] = 32 // bits
    shifts = (bits * jnp.arange(32 // bits, dtype=jnp.uint32)).reshape(shape)
    return jnp.sum(codes << shifts, axis=axis, dtype=jnp.uint32)
