"""kivi_push for the Triton back end: of each row and head a program owns a group of keys, with the
values of the same tokens for the flush "block"; one more owns the newest token and the value that
leaves the tail. The former are idle unless the row completes a block.

Nothing is read after it was written. Programs run in any order, so none reads what another one
writes: a complete block takes its last token from the operands, not from the tail, and the keys of
a block that are replaced in the tail are written by their groups' programs alone. Within a program
several warps may load the same numbers, of which one warp stores: there is a barrier in between.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.common import launch, load, store
from pallas_kernels.kivi_push.configs import Config
from pallas_kernels.kivi_push.reference import rounded
from pallas_kernels.quantize_pack.triton import put_keys, put_values, quantized


def kivi_push(
    k_words, k_scale, k_zero, v_words, v_scale, v_zero, tail_k, tail_v, k, v, stored, count,
    *, key_bits: int, value_bits: int, key_group: int, value_group: int, flush: str,
    config: Config, interpret: bool,
):  # fmt: skip
    batch, heads, residual, _ = tail_k.shape
    arrays = k_words, k_scale, k_zero, v_words, v_scale, v_zero, tail_k, tail_v
    kernel = functools.partial(
        _kernel, key_bits=key_bits, value_bits=value_bits, key_group=key_group,
        value_group=value_group, is_sliding=flush == "sliding", numbers=config.numbers,
        barrier=_no_barrier if interpret else plgpu.debug_barrier,
    )  # fmt: skip
    return launch(
        kernel, *arrays, k, v, stored, count,
        out=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays),
        grid=(batch * heads, residual // key_group + 1),
        name="kivi_push", warps=config.warps, stages=config.stages, interpret=interpret,
        aliases={i: i for i in range(len(arrays))},
    )  # fmt: skip


def _no_barrier() -> None:
    """A barrier has no rule for interpretation, which has no warps either."""


def _kernel(
    *refs, key_bits, value_bits, key_group, value_group, is_sliding, numbers, barrier
):  # fmt: skip
    k_ref, v_ref, stored_ref, count_ref = refs[8:12]
    keys, values, (tail_k_ref, tail_v_ref) = refs[12:15], refs[15:18], refs[18:]
    heads, residual, width = tail_k_ref.shape[1:]
    at = pl.program_id(0) // heads, pl.program_id(0) % heads
    stored, takes = load(stored_ref.at[at[0]]), load(count_ref.at[at[0]]) > 0
    slot, program = stored % residual, pl.program_id(1)
    is_last = program == residual // key_group
    completes = takes & (slot == residual - 1)
    first = stored - slot + program * key_group  # a group's first token, if the block is complete

    @pl.when(completes & jnp.logical_not(is_last))
    def _():
        size = min(width, numbers // key_group)
        for channel in range(0, width, size):
            slots = program * key_group + jnp.arange(key_group)
            channels = channel + jnp.arange(size)
            x = _complete(tail_k_ref, k_ref, at, slots, channels)
            new = quantized(x, key_bits, 0, keys[1].dtype)
            has_room = stored < keys[0].shape[2] * (32 // key_bits)
            pl.when(has_room)(
                functools.partial(put_keys, keys, at, first, channels, *new, key_bits)
            )
            if is_sliding:
                barrier()
                replaced = _tile(tail_k_ref, at, slots, channels)
                store(replaced, rounded(_read(*new), tail_k_ref.dtype))

    @pl.when(takes & is_last)
    def _():
        channels = jnp.arange(width)
        if is_sliding:
            _put_leaving(values, tail_v_ref, at, slot, stored - residual, value_bits, value_group)
            barrier()
        store(tail_v_ref.at[(*at, slot, channels)], load(v_ref.at[(*at, 0, channels)]))

        @pl.when(jnp.logical_not(completes & is_sliding))
        def _():
            store(tail_k_ref.at[(*at, slot, channels)], load(k_ref.at[(*at, 0, channels)]))

    if is_sliding:
        return

    @pl.when(completes & jnp.logical_not(is_last) & (stored < values[0].shape[2]))
    def _():
        size = min(key_group, numbers // value_group)
        for token in range(0, key_group, size):
            order = token + jnp.arange(size)
            for m in range(width // value_group):
                channels = m * value_group + jnp.arange(value_group)
                x = _complete(tail_v_ref, v_ref, at, program * key_group + order, channels)
                new = quantized(x, value_bits, 1, values[1].dtype)
                put_values(values, at, first + order, jnp.full_like(order, m), *new, value_bits)


def _put_leaving(refs, tail_ref, at, slot, place, bits: int, group: int):
    """The value in a slot of the tail to its place among the codes, if it has one."""

    @pl.when((place >= 0) & (place < refs[0].shape[2]))
    def _():
        parts = jnp.arange(tail_ref.shape[3] // group)
        channels = parts[:, None] * group + jnp.arange(group)[None]
        new = quantized(load(tail_ref.at[(*at, slot, channels)]), bits, 1, refs[1].dtype)
        put_values(refs, at, jnp.zeros_like(parts) + place, parts, *new, bits)


def _complete(tail_ref, new_ref, at, slots, channels):
    """Those slots and channels of a complete block, of which the tail lacks the last token."""
    shape = len(slots), len(channels)
    is_new = jnp.broadcast_to((slots == tail_ref.shape[2] - 1)[:, None], shape)
    old = load(_tile(tail_ref, at, slots, channels), mask=jnp.logical_not(is_new), other=0.0)
    return jnp.where(is_new, load(new_ref.at[(*at, 0, channels)])[None], old)


def _read(codes, scale, zero):
    scale, zero = (x.astype(jnp.float32)[None] for x in (scale, zero))
    return codes.astype(jnp.int32).astype(jnp.float32) * scale + zero


def _tile(ref, at, slots, channels):
    return ref.at[(*at, slots[:, None], channels[None])]
