"""Attention over packed codes in plain `jnp`: unpack everything, then attend."""

from jaxtyping import Array, Float

from pallas_kernels.dense_attention import reference as dense
from pallas_kernels.quantization import dequantize, unpack


def unpacked(
    words: Array, scale: Array, zero: Array, bits: int, token_words: bool, dtype: str = "float32"
) -> Float[Array, "B K S H"]:
    """The numbers `code * scale + zero`; words run along tokens (keys) or channels (values)."""
    axis = 2 if token_words else 3
    codes = unpack(words, bits, axis)
    return dequantize(codes, scale, zero, codes.shape[axis] // scale.shape[axis], axis, dtype)


def kivi_attention(
    q, k_words, k_scale, k_zero, v_words, v_scale, v_zero, visible, distance, stop, extra,
    *, key_bits: int, value_bits: int, **spec,
):  # fmt: skip
    slots, dtype = visible.shape[3], q.dtype.name
    k = unpacked(k_words, k_scale, k_zero, key_bits, True, dtype)[:, :, :slots]
    v = unpacked(v_words, v_scale, v_zero, value_bits, False, dtype)[:, :, :slots]
    return dense.dense_attention(q, k, v, visible, distance, stop, extra, **spec)
