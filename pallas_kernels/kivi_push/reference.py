"""kivi_push in plain `jnp`: for every row what a completed block would be, then a choice."""

import jax.numpy as jnp

from pallas_kernels.kivi_attention.reference import unpacked
from pallas_kernels.quantization import pack, quantize
from pallas_kernels.quantize_pack.reference import quantize_pack

NOWHERE = jnp.iinfo(jnp.int32).max


def rounded(x, dtype):
    """Float32 numbers in the dtype of a tail; float16 takes its largest number for larger ones."""
    return (jnp.clip(x, -65504.0, 65504.0) if dtype == jnp.float16 else x).astype(dtype)


def kivi_push(
    k_words, k_scale, k_zero, v_words, v_scale, v_zero, tail_k, tail_v, k, v, stored, count,
    *, key_bits: int, value_bits: int, key_group: int, value_group: int, flush: str,
):  # fmt: skip
    residual = tail_k.shape[2]
    slot, takes = stored % residual, count > 0
    completes = takes & (slot == residual - 1)
    newest = (jnp.arange(residual) == slot[:, None])[:, None, :, None]
    new_k, new_v = jnp.where(newest, k, tail_k), jnp.where(newest, v, tail_v)
    block = jnp.where(completes, stored // residual, NOWHERE)[:, None]
    keys = quantize_pack(
        k_words, k_scale, k_zero, new_k, block, bits=key_bits, group=key_group, axis=2
    )
    leaving, place = new_v, block
    if flush == "sliding":
        leaving = jnp.take_along_axis(tail_v, slot[:, None, None, None], axis=2)
        place = jnp.where(takes & (stored >= residual), stored - residual, NOWHERE)[:, None]
        codes, scale, zero = quantize(new_k, key_bits, key_group, 2, k_scale.dtype.name)
        read = unpacked(pack(codes, key_bits, 2), scale, zero, key_bits, token_words=True)
        new_k = jnp.where(completes[:, None, None, None], rounded(read, tail_k.dtype), new_k)
    values = quantize_pack(
        v_words, v_scale, v_zero, leaving, place, bits=value_bits, group=value_group, axis=3
    )
    takes = takes[:, None, None, None]
    return *keys, *values, jnp.where(takes, new_k, tail_k), jnp.where(takes, new_v, tail_v)
