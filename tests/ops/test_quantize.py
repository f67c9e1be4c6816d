"""Group quantization against a numpy oracle, its error, and packed words."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.ops.quantize import BITS, dequantize, pack, quantize, unpack

AXES = (0, 1, 2, -1)
# relative squared error of quantized N(0, 1) groups: bits, group -> expectation
EXPECTED_ERROR = {
    (2, 16): 0.1068,
    (2, 32): 0.1543,
    (2, 64): 0.2024,
    (2, 128): 0.2512,
    (4, 16): 0.00424,
    (4, 32): 0.00611,
    (4, 64): 0.00805,
    (4, 128): 0.00994,
}


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def oracle(x: np.ndarray, bits: int, group: int, axis: int, dtype: str = "float16"):
    """Codes, scale and zero, group by group."""
    x = np.moveaxis(x, axis, -1)
    codes = np.zeros(x.shape, np.uint32)
    scale = np.zeros((*x.shape[:-1], x.shape[-1] // group), dtype)
    zero = np.zeros_like(scale)
    for at in np.ndindex(scale.shape):
        part = (*at[:-1], slice(at[-1] * group, (at[-1] + 1) * group))
        low, high = x[part].min(), x[part].max()
        zero[at] = low
        scale[at] = (high - low) * np.float32(1 / (2**bits - 1))
        step = np.float32(scale[at])
        if step > 0:
            steps = np.round((x[part] - np.float32(zero[at])) / step)
            codes[part] = np.clip(steps, 0, 2**bits - 1)
    return tuple(np.moveaxis(y, -1, axis) for y in (codes, scale, zero))


def round_trip(x, bits: int, group: int, axis: int, dtype: str = "float16") -> np.ndarray:
    return np.asarray(dequantize(*quantize(jnp.asarray(x), bits, group, axis, dtype), group, axis))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_codes_and_metadata_equal_the_oracle(bits, axis, dtype):
    x = 3 * normal(8, 16, 24)
    found = quantize(jnp.asarray(x), bits, 8, axis, dtype)
    for array, expected in zip(found, oracle(x, bits, 8, axis, dtype), strict=True):
        np.testing.assert_array_equal(array, expected)


@given(st.sampled_from(BITS), st.sampled_from(AXES), st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_packing_and_unpacking_gives_the_same_codes(bits, axis, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (16, 32, 16), np.uint32)
    words = pack(jnp.asarray(codes), bits, axis)
    assert words.size == codes.size * bits // 32 and words.dtype == jnp.uint32
    np.testing.assert_array_equal(unpack(words, bits, axis), codes)


@pytest.mark.parametrize("bits", BITS)
def test_the_first_code_is_in_the_lowest_bits(bits):
    count = 32 // bits
    codes = np.random.default_rng(0).integers(0, 2**bits, (5, 2 * count), np.uint32)
    words = np.asarray(pack(jnp.asarray(codes), bits, 1))
    for row in range(5):
        for word in range(2):
            parts = codes[row, word * count : (word + 1) * count]
            assert words[row, word] == sum(int(c) << (bits * i) for i, c in enumerate(parts))


@pytest.mark.parametrize("bits", BITS)
def test_a_last_code_with_the_sign_bit_survives(bits):
    codes = np.zeros((1, 32 // bits), np.uint32)
    codes[0, -1] = 2**bits - 1
    words = pack(jnp.asarray(codes), bits, -1)
    assert int(words[0, 0]) >= 2**31
    np.testing.assert_array_equal(unpack(words, bits, -1), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("offset", [0.0, 5.0, -40.0])
def test_the_error_stays_within_half_a_step(bits, offset):
    x = normal(64, 32) + np.float32(offset)
    codes, scale, zero = quantize(jnp.asarray(x), bits, 32, 1)
    error = np.abs(round_trip(x, bits, 32, 1) - x)
    step, low = np.float32(scale), np.abs(np.float32(zero))
    # half a step, and at the edges what rounding scale and zero to float16 adds
    assert (error <= step / 2 * (1 + 2**-9) + (2**bits - 1) * step * 2**-11 + low * 2**-10).all()
    if offset == 0:
        assert (np.asarray(codes).min(axis=1) == 0).all()
        assert (np.asarray(codes).max(axis=1) == 2**bits - 1).all()


@pytest.mark.parametrize("value", [0.0, -1.5, 65504.0, 1e-8])
@pytest.mark.parametrize("bits", BITS)
def test_constant_groups_have_code_0(value, bits):
    codes, scale, zero = quantize(jnp.full((4, 16), value), bits, 8, 1)
    assert not np.asarray(codes).any() and not np.asarray(scale).any()
    np.testing.assert_array_equal(zero, np.full((4, 2), np.float16(value)))


def test_a_constant_whose_zero_is_rounded_has_code_0():
    x = jnp.full((1, 16), 60001.0)  # float16 steps by 32 there
    assert not np.asarray(quantize(x, 2, 16, 1).codes).any()


@pytest.mark.parametrize("extreme", [1e6, -1e6, 3e38, np.inf, -np.inf])
def test_metadata_saturates(extreme):
    x = np.array([[1.0, extreme, 0.0, 2.0]], np.float32)
    codes, scale, zero = quantize(jnp.asarray(x), 2, 4, 1)
    for array in (codes, scale, zero):
        assert np.isfinite(np.asarray(array, np.float32)).all()
    assert np.isfinite(dequantize(codes, scale, zero, 4, 1)).all()


def test_nan_stays_in_its_group():
    x = normal(2, 16)
    x[0, 3] = np.nan
    back = round_trip(x, 4, 8, 1)
    assert np.isnan(back[0, :8]).all()
    assert np.isfinite(back[0, 8:]).all() and np.isfinite(back[1]).all()


@pytest.mark.parametrize("bits, group", EXPECTED_ERROR)
def test_the_error_of_normal_numbers_is_the_expected_one(bits, group):
    x = normal(16384, 128, seed=bits)
    error = ((round_trip(x, bits, group, 1) - x) ** 2).mean()
    assert error == pytest.approx(EXPECTED_ERROR[bits, group], rel=0.03)


def test_half_precision_input_is_quantized_in_float32():
    x = normal(4, 16).astype(np.float16)
    half, full = (quantize(jnp.asarray(y), 4, 8, 1) for y in (x, x.astype(np.float32)))
    for a, b in zip(half, full, strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_does_not_fit_is_refused():
    x = jnp.zeros((4, 12))
    with pytest.raises(ValueError, match="axis 1 of length 12 does not split into groups of 8"):
        quantize(x, 2, 8, 1)
    with pytest.raises(ValueError, match="length 12 does not split into words of 16"):
        pack(x.astype(jnp.uint32), 2, 1)
    with pytest.raises(ValueError, match="2, 4 or 8 bits, got 3"):
        quantize(x, 3, 4, 1)
    with pytest.raises(ValueError, match="axis 1 has 12 codes, 2 scales of 4 each"):
        dequantize(x.astype(jnp.uint32), jnp.ones((4, 2)), jnp.ones((4, 2)), 4, 1)
