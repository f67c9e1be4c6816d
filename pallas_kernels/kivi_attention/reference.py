"""Attention over packed codes in plain `jnp`: unpack everything, then attend."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dense_attention import reference as dense


def unpacked(words, scale, zero, bits: int, token_words: bool) -> Float[Array, "B K S H"]:
    """The numbers `code * scale + zero`; words run along tokens (keys) or channels (values)."""
    axis = 2 if token_words else 3
    count = 32 // bits
    shifts = bits * jnp.arange(count, dtype=jnp.uint32)
    codes = jnp.expand_dims(words, axis + 1) >> shifts.reshape(-1, *(1,) * (3 - axis))
    codes = (codes & jnp.uint32(2**bits - 1)).astype(jnp.int32)
    shape = list(words.shape)
    shape[axis] *= count
    codes = codes.reshape(shape).astype(jnp.float32)
    group = shape[axis] // scale.shape[axis]
    scale, zero = (jnp.repeat(x.astype(jnp.float32), group, axis=axis) for x in (scale, zero))
    return codes * scale + zero


def kivi_attention(
    q, k_words, k_scale, k_zero, v_words, v_scale, v_zero, visible, distance, stop, extra,
    *, key_bits: int, value_bits: int, **spec,
):  # fmt: skip
    slots = visible.shape[3]
    k = unpacked(k_words, k_scale, k_zero, key_bits, token_words=True)[:, :, :slots]
    v = unpacked(v_words, v_scale, v_zero, value_bits, token_words=False)[:, :, :slots]
    return dense.dense_attention(
        q, k.astype(q.dtype), v.astype(q.dtype), visible, distance, stop, extra, **spec
    )
