"""Products with weights of 4 or 8 bits: the layout, reference, interpret mode, CUDA."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.weight_matmul import (
    dequantize_weight,
    quantize_weight,
    weight_matmul,
    weight_matmuls,
)
from pallas_kernels.weight_matmul.configs import Config, heuristic
from tests.combinations import diagonal
from tests.kernels.checking import agree, compiles_without_spills, lowers_for_cuda

STATIC = ("bits", "group", "is_symmetric", "scale_dtype")
quantized = jax.jit(quantize_weight, static_argnames=STATIC)


def problem(seed: int):
    """Random shapes and arguments: odd numbers of outputs, one row to more than a tile."""
    rng = np.random.default_rng(seed)
    rows = int(rng.choice([1, 1, rng.integers(2, 17), rng.integers(17, 65), 70]))
    bits, group = int(rng.choice([4, 8])), int(rng.choice([16, 32, 64, 128]))
    outputs, inputs = int(rng.integers(1, 400)), group * int(rng.integers(1, 8))
    w = rng.normal(size=(outputs, inputs)) * rng.lognormal(size=(outputs, 1)) + rng.choice([0, 1.5])
    weight = quantized(
        jnp.asarray(w, jnp.float32), bits, group,
        is_symmetric=[None, True, False][rng.integers(3)],
        scale_dtype=str(rng.choice(["bfloat16", "float16"])),
    )  # fmt: skip
    x = jnp.asarray(rng.normal(size=(rows, inputs)), rng.choice(["float32", "bfloat16"]))
    config = Config(
        rows=int(rng.choice([8, 16])), words=int(rng.choice([16, 32])),
        splits=int(rng.integers(1, 5)), depth=int(rng.choice([16, 32, 64])),
    )  # fmt: skip
    return x, weight, rng.choice([None, config])


QUICK = (1, 3, 43)
ALL = [pytest.param(seed, marks=pytest.mark.slow) for seed in range(45) if seed not in QUICK]


@pytest.mark.parametrize("seed", [*QUICK, *ALL])
def test_the_kernel_agrees_with_its_reference(seed):
    x, weight, config = problem(seed)
    # Products are exact in both. What remains is the order of float32 sums, and what the codes are
    # raised by, which is taken off again: up to 2**bits times the rounding of a group's sum.
    agree(functools.partial(weight_matmul, config=config), x, weight, tolerance=1e-5)


@pytest.mark.parametrize("rows", [1, 11])
def test_one_launch_multiplies_several_weights(rows):
    rng = np.random.default_rng(7)
    x = jnp.asarray(rng.normal(size=(rows, 128)), jnp.bfloat16)
    weights = [quantized(jnp.asarray(rng.normal(size=(n, 128))), 4, 32) for n in (40, 300, 8)]
    agree(weight_matmuls, x, weights, tolerance=1e-5)
    lowers_for_cuda(weight_matmuls, x, weights)
    with pytest.raises(ValueError, match="the same bits and group, got {"):
        weight_matmuls(x, [weights[0], quantized(jnp.ones((8, 128)), 8, 32)])


def numbers_of(weight):
    """What is stored, code by code, in float64, and the scale of each number."""
    codes, scale = np.asarray(weight.codes), np.asarray(weight.scale, np.float64)
    numbers, steps = np.zeros(weight.shape), np.zeros(weight.shape)
    for o, i in np.ndindex(*weight.shape):
        lane, word = divmod(o, codes.shape[1])
        code = int(codes[i, word]) >> (lane * weight.bits) & (2**weight.bits - 1)
        g = i // weight.group
        zero = 2 ** (weight.bits - 1) if weight.zero is None else int(weight.zero[g, o])
        numbers[o, i], steps[o, i] = scale[g, o] * (code - zero), scale[g, o]
    return numbers, steps


@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize("bits, scale_dtype", [(4, "bfloat16"), (8, "float16"), (8, "bfloat16")])
def test_every_weight_is_stored_within_half_a_step(bits, is_symmetric, scale_dtype):
    rng = np.random.default_rng(bits)
    w = rng.normal(size=(21, 96)).astype(np.float32)
    w[0], w[1], w[2, :32], w[3] = abs(w[0]), -abs(w[1]), 0, w[3] * 1e-3
    weight = quantized(jnp.asarray(w), bits, 32, is_symmetric=is_symmetric, scale_dtype=scale_dtype)
    numbers, steps = numbers_of(weight)
    np.testing.assert_array_equal(np.asarray(dequantize_weight(weight)), numbers)
    assert (abs(numbers - w) <= steps * (0.5 + 1e-5)).all()  # the scale itself is rounded up
    ranges = np.abs(w).reshape(21, 3, 32).max(axis=2)
    most = 2 * ranges / (2**bits - 1) * (1 + 2 / 2**bits) * (1 + 2**-7)
    assert (steps.reshape(21, 3, 32)[..., 0] <= most).all()


def test_the_product_is_that_of_the_stored_weight():
    x, weight, _ = problem(1)
    x = x.astype(jnp.bfloat16)
    expected = np.asarray(x, np.float64) @ numbers_of(weight)[0].T
    found = weight_matmul(x, weight)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * abs(expected).max())


def test_eight_bits_are_symmetric_and_four_are_not():
    w = jnp.ones((8, 32))
    assert quantized(w, 8, 32).zero is None
    assert quantized(w, 4, 32).zero is not None


def test_a_weight_takes_the_bytes_that_it_says():
    weight = jax.eval_shape(lambda w: quantize_weight(w, 4, 64), jnp.zeros((576, 1536)))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(weight))
    assert size == 576 * 1536 * (4 + 16 / 64 + 8 / 64) / 8


SHAPES = [
    pytest.param(4096, 11008, id="llama-2 up"),
    pytest.param(11008, 4096, id="llama-2 down", marks=pytest.mark.slow),
    pytest.param(576, 1536, id="smollm2 up", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(
    "inputs, outputs, rows, bits",
    diagonal(SHAPES, [1, 16, pytest.param(64, marks=pytest.mark.slow)], [4, 8]),
)
def test_it_compiles_for_an_h200_without_spills(inputs, outputs, rows, bits):
    group = 64 if inputs == 576 else 128
    weight = jax.eval_shape(
        lambda w: quantize_weight(w, bits, group),
        jax.ShapeDtypeStruct((outputs, inputs), "float32"),
    )
    x = jax.ShapeDtypeStruct((rows, inputs), jnp.bfloat16)
    lowers_for_cuda(weight_matmul, x, weight)
    compiles_without_spills(weight_matmul, x, weight)


@pytest.mark.parametrize("rows", [1, 7, 16, 40, 64, 200])
@pytest.mark.parametrize("outputs, groups", [(576, 24), (1536, 9), (49152, 9), (11008, 32)])
def test_no_split_of_the_default_tiling_is_empty(outputs, groups, rows):
    config = heuristic(rows, outputs // 8, groups)
    part = -(-groups // config.splits)
    assert (config.splits - 1) * part < groups
    assert config.rows == (8 if rows <= 8 else 16)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bits": 2}, "codes have 4 or 8 bits, got 2"),
        ({"group": 48}, "group must be 16, 32, 64 or 128 inputs, got 48"),
        ({"group": 128}, r"\[outputs, a multiple of group 128\], got \[24, 192\]"),
        ({"w": (24,)}, r"\[outputs, a multiple of group 64\], got \[24\]"),
        ({"scale_dtype": "int8"}, "scale_dtype must be one of .*, got 'int8'"),
    ],
)
def test_weights_that_cannot_be_stored_are_refused(change, message):
    given = {"w": (24, 192), "bits": 4, "group": 64} | change
    with pytest.raises(ValueError, match=message):
        quantize_weight(jnp.ones(given.pop("w")), **given)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": (2, 200)}, r"x must have shape \[_, 192\], got \[2, 200\]"),
        ({"x": (192,)}, r"x must have shape \[_, 192\], got \[192\]"),
        ({"bits": 8}, r"weight.codes must have shape \[_, 8\], got \[192, 4\]"),
        ({"group": 32}, r"weight.scale must have shape \[6, 24\], got \[3, 24\]"),
        ({"zero": jnp.zeros((3, 25), jnp.uint8)}, r"weight.zero must have shape \[3, 24\]"),
        ({"codes": jnp.zeros((192, 4), jnp.int32)}, "words of uint32, got int32"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    weight = quantized(jnp.ones((24, 192)), 4, 64)
    x = jnp.ones(change.get("x", (2, 192)))
    fields = {name: value for name, value in change.items() if name != "x"}
    with pytest.raises(ValueError, match=message):
        weight_matmul(x, dataclasses.replace(weight, **fields))


def test_a_tile_that_no_kernel_has_is_refused():
    with pytest.raises(ValueError, match="rows of a tile are 8 or 16, got 1"):
        Config(rows=1, words=16, splits=1)
    with pytest.raises(ValueError, match="words must be a power of two of at least 16, got 8"):
        Config(rows=16, words=8, splits=1)
