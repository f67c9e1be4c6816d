"""Attention over packed codes, and their packing: reference, interpret mode, CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.ops.quantize import dequantize, pack, quantize
from pallas_kernels.dense_attention import dense_attention
from pallas_kernels.kivi_attention import PackedHalf, kivi_attention
from pallas_kernels.kivi_attention.configs import Config
from pallas_kernels.kivi_attention.reference import unpacked
from pallas_kernels.softmax_state import ExtraKeys
from tests.combinations import diagonal
from tests.kernels.checking import agree, compiles_without_spills, lowers_for_cuda


def packed_half(rng, shape, bits, group, axis, dtype="float16"):
    """Random numbers of `shape` in packed form, and as the library reads them."""
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)
    codes, scale, zero = quantize(x, bits, group, axis, dtype)
    return PackedHalf(pack(codes, bits, axis), scale, zero), dequantize(
        codes, scale, zero, group, axis
    )


def problem(seed: int):
    rng = np.random.default_rng(seed)
    b, k, g, t = (int(rng.integers(1, high)) for high in (3, 4, 5, 7))
    h = int(rng.choice([32, 64, 128]))
    key_bits, value_bits = (int(rng.choice([2, 4, 8])) for _ in range(2))
    key_group = int(rng.choice([16, 32, 64, 128]))
    value_group = int(rng.choice([size for size in (16, 32, 64, 128) if size <= h]))
    room = 128 * int(rng.integers(1, 4))
    s = int(rng.integers(1, room + 1))
    dtype = str(rng.choice(["float32", "bfloat16"]))
    metadata = str(rng.choice(["float16", "bfloat16", "float32"]))
    keys, k_full = packed_half(rng, (b, k, room, h), key_bits, key_group, 2, metadata)
    values, v_full = packed_half(rng, (b, k, room, h), value_bits, value_group, 3, metadata)
    q = jnp.asarray(rng.normal(size=(b, k, g, t, h)), dtype)
    visible = jnp.asarray(rng.random((b, 1, int(rng.choice([1, t])), s)) < rng.choice([0.5, 1]))
    stop = jnp.asarray(rng.integers(0, s + 1, b), jnp.int32)
    spec = {"scale": float(h**-0.5), "softcap": rng.choice([None, 20.0])}
    distance = None
    if rng.random() < 0.4:
        distance = jnp.asarray(rng.integers(0, 60, (b, 1, t, s)), jnp.int32)
        spec["slopes"] = tuple(rng.uniform(0.01, 0.3, k * g).tolist())
    spec |= {"key_bits": key_bits, "value_bits": value_bits}
    spec["config"] = rng.choice([None, Config(rows=16, splits=3)])
    return q, keys, values, visible, distance, stop, spec, (k_full, v_full)


QUICK, ALL = range(3), [pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 40)]


@pytest.mark.parametrize("seed", [*QUICK, *ALL])
def test_the_kernel_agrees_with_its_reference(seed):
    q, keys, values, visible, distance, stop, spec, _ = problem(seed)
    # in bfloat16 the reference rounds unpacked numbers, the kernel the folded query
    tolerance = 5e-5 if q.dtype == jnp.float32 else 3e-2
    run = functools.partial(kivi_attention, **spec)
    agree(run, q, keys, values, visible, distance, stop, tolerance=tolerance)


@pytest.mark.parametrize("seed", [1, 2])
def test_given_the_rest_of_the_keys_it_attends_to_all(seed):
    q, keys, values, visible, distance, stop, spec, _ = problem(seed)
    rng = np.random.default_rng(seed)
    scores = jnp.asarray(3 * rng.normal(size=(*q.shape[:-1], 3)), jnp.float32)
    fresh = jnp.asarray(rng.normal(size=(*q.shape[:2], 3, q.shape[-1])), q.dtype)
    run = functools.partial(kivi_attention, **spec)
    reference = jax.jit(functools.partial(run, implementation="reference"))
    other = reference(-q, keys, values, visible, distance, stop)
    extra = ExtraKeys(scores, fresh, other if seed % 2 else None)
    tolerance = 5e-5 if q.dtype == jnp.float32 else 3e-2
    agree(run, q, keys, values, visible, distance, stop, extra, tolerance=tolerance)


@pytest.mark.parametrize("seed", [3, 4])
def test_the_reference_is_dense_attention_over_what_the_library_unpacks(seed):
    q, keys, values, visible, distance, _, spec, full = problem(seed)
    q = q.astype(jnp.float32)
    run = functools.partial(kivi_attention, implementation="reference", **spec)
    found = jax.jit(run)(q, keys, values, visible, distance)
    for name in ("key_bits", "value_bits", "config"):
        spec.pop(name)
    k, v = (x[:, :, : visible.shape[3]] for x in full)
    run = functools.partial(dense_attention, implementation="reference", **spec)
    expected = jax.jit(run)(q, k, v, visible, distance)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_code_is_unpacked_as_an_independent_routine_does(bits):
    """Random words, so that every code occurs at every place."""
    rng = np.random.default_rng(bits)
    for token_words in (True, False):
        words = rng.integers(0, 2**32, (2, 3, 8, 16), dtype=np.uint32)
        axis = 2 if token_words else 3
        ones = [2, 3, 8, 16]
        ones[axis] = 1
        found = unpacked(
            jnp.asarray(words), jnp.ones(ones), jnp.zeros(ones), bits, token_words=token_words
        )
        digits = "".join(f"{int(word):032b}"[::-1] for word in words.ravel())
        codes = [int(digits[i : i + bits][::-1], 2) for i in range(0, len(digits), bits)]
        expected = np.array(codes, np.float32).reshape(*words.shape, 32 // bits)
        if token_words:
            expected = expected.swapaxes(3, 4)
        np.testing.assert_array_equal(found, expected.reshape(found.shape))


def array(*shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, dtype)


def halves(b, k, s, h, bits, group=32):
    count = 32 // bits
    scale = array(b, k, s // group, h, dtype="float16")
    keys = PackedHalf(array(b, k, s // count, h, dtype="uint32"), scale, scale)
    scale = array(b, k, s, h // group, dtype="float16")
    return keys, PackedHalf(array(b, k, s, h // count, dtype="uint32"), scale, scale)


SHAPES = [
    pytest.param(8, 8, 4, 1, 128, "bfloat16", id="llama-3"),
    pytest.param(1, 3, 3, 64, 64, "bfloat16", id="tree of 64"),
    pytest.param(2, 3, 3, 1, 64, "float32", id="float32"),
]


@pytest.mark.parametrize("b, k, g, t, h, dtype, bits", diagonal(SHAPES, [2, 4, 8]))
def test_it_compiles_for_an_h200_without_spills(b, k, g, t, h, dtype, bits):
    keys, values = halves(b, k, 8192, h, bits)
    args = (
        array(b, k, g, t, h, dtype=dtype), keys, values, array(b, 1, t, 8192, dtype="bool"), None,
        array(b, dtype="int32"),
    )  # fmt: skip
    run = functools.partial(kivi_attention, scale=0.1, key_bits=bits, value_bits=bits)
    lowers_for_cuda(run, *args, calls=2)  # the second merges the splits
    compiles_without_spills(run, *args)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"key_bits": 3}, "keys have 2, 4 or 8 bits, got 3"),
        ({"key_bits": 4}, "`visible` has 256 tokens, keys only 128"),
        ({"key_bits": 4, "visible": (1, 1, 1, 64)}, "keys must have groups of 16, 32, 64 or 128"),
        ({"visible": (1, 1, 1, 500)}, "`visible` has 500 tokens, keys only 256"),
        ({"values": "keys"}, "values.words must have shape"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    rng = np.random.default_rng(0)
    keys, _ = packed_half(rng, (1, 2, 256, 64), 2, 16, 2)
    values, _ = packed_half(rng, (1, 2, 256, 64), 2, 16, 3)
    if change.get("values") == "keys":
        values = keys
    visible = jnp.ones(change.get("visible", (1, 1, 1, 256)), bool)
    with pytest.raises(ValueError, match=message):
        kivi_attention(
            jnp.zeros((1, 2, 1, 1, 64)), keys, values, visible, scale=1.0, value_bits=2,
            key_bits=change.get("key_bits", 2),
        )  # fmt: skip
