"""Products of a few rows: reference, interpret mode, CUDA; and where the models use them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from pallas_kernels.skinny_matmul import feed_forward_hidden, skinny_matmul
from pallas_kernels.skinny_matmul.configs import Config, heuristic
from tests.combinations import diagonal
from tests.kernels.checking import agree, compiles_without_spills, lowers_for_cuda

CONFIGS = [
    None,
    Config(rows=1, outputs=2, depth=32),
    Config(rows=16, outputs=16, depth=16, warps=2),
]


def problem(seed: int):
    """One to four weights of odd sizes, or a feed-forward block, with some biases."""
    rng = np.random.default_rng(seed)
    rows, inputs = int(rng.choice([1, 1, 2, 7, 16, 19])), int(rng.integers(1, 200))
    dtype = rng.choice(["float32", "bfloat16"])

    def some(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    config = CONFIGS[rng.integers(len(CONFIGS))]
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    if rng.random() < 0.5:
        outputs = [int(n) for n in rng.integers(1, 90, size=rng.integers(1, 5))]
        weights = [some(n, inputs) for n in outputs]
        biases = [some(n) if rng.random() < 0.5 else None for n in outputs]
        run = functools.partial(skinny_matmul, config=config)
        if rng.random() < 0.5:
            return run, (some(rows, inputs), weights, biases), tolerance
        return live_problem(rng, config, some, rows, biases), (), tolerance
    outputs = int(rng.integers(1, 90))
    activation = rng.choice(["silu", "gelu", "gelu_tanh", "relu"])
    is_gated, has_bias = rng.random(2) < 0.5

    def run(x, up, gate, up_bias, gate_bias, implementation):
        return feed_forward_hidden(
            x, up, gate, activation=activation, up_bias=up_bias, gate_bias=gate_bias,
            config=config, implementation=implementation,
        )  # fmt: skip

    up, gate = some(outputs, inputs), some(outputs, inputs) if is_gated else None
    biases = some(outputs) if has_bias else None, some(outputs) if has_bias and is_gated else None
    return run, (some(rows, inputs), up, gate, *biases), tolerance


def live_problem(rng, config, some, rows, biases):
    """Weights of parts of outputs or inputs, of which some are live in some of the weights."""
    parts, axis = int(rng.integers(1, 7)), ("outputs", "inputs")[int(rng.integers(2))]
    sizes = [parts * int(n) for n in rng.integers(1, 20, size=len(biases))]
    inputs = parts * int(rng.integers(1, 30))
    weights = [some(n, inputs) for n in sizes]
    biases = [None if bias is None else some(n) for bias, n in zip(biases, sizes, strict=True)]
    live = [jnp.asarray(rng.random(parts) < 0.5) if rng.random() < 0.7 else None for _ in sizes]
    x = some(rows, inputs)
    return functools.partial(
        skinny_matmul, x, weights, biases, live=live, parts=axis, config=config
    )


def test_parts_that_are_not_live_are_not_looked_at():
    """Their numbers may be anything, and the results are those of a weight of zeros there."""
    rng = np.random.default_rng(5)
    x, w = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3, 24), (12, 24)))
    live = jnp.asarray([True, False, True, False])
    for axis, shape in (("outputs", (4, 3, 24)), ("inputs", (12, 4, 6))):
        where = np.expand_dims(np.asarray(live), (1, 2) if axis == "outputs" else (0, 2))
        zeros, infinite = (
            jnp.where(where, w.reshape(shape), other).reshape(w.shape) for other in (0.0, jnp.inf)
        )
        (wanted,) = skinny_matmul(x, [zeros], implementation="reference")
        for kind in ("reference", "interpret"):
            (found,) = skinny_matmul(x, [infinite], live=[live], parts=axis, implementation=kind)
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


QUICK, ALL = range(8), [pytest.param(seed, marks=pytest.mark.slow) for seed in range(8, 48)]


@pytest.mark.parametrize("seed", [*QUICK, *ALL])
def test_the_kernel_agrees_with_its_reference(seed):
    run, args, tolerance = problem(seed)
    agree(run, *args, tolerance=tolerance)


@pytest.mark.parametrize("implementation", ["reference", "interpret"])
@pytest.mark.parametrize("rows", [1, 5])
def test_products_and_hidden_values_are_those_of_torch(rows, implementation):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(rows, 40)).astype(np.float32)
    gate, up = rng.normal(size=(2, 24, 40)).astype(np.float32)
    bias = rng.normal(size=24).astype(np.float32)
    tx, tg, tu, tb = map(torch.from_numpy, (x, gate, up, bias))
    first, second = skinny_matmul(
        jnp.asarray(x), [jnp.asarray(gate), jnp.asarray(up)], [None, jnp.asarray(bias)],
        implementation=implementation,
    )  # fmt: skip
    linear = torch.nn.functional.linear
    np.testing.assert_allclose(first, linear(tx, tg), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(second, linear(tx, tu, tb), rtol=1e-5, atol=1e-5)
    hidden = feed_forward_hidden(
        jnp.asarray(x), jnp.asarray(up), jnp.asarray(gate), activation="silu",
        up_bias=jnp.asarray(bias), implementation=implementation,
    )  # fmt: skip
    wanted = torch.nn.functional.silu(linear(tx, tg)) * linear(tx, tu, tb)
    np.testing.assert_allclose(hidden, wanted, rtol=1e-5, atol=1e-5)


def shape(*sizes: int, dtype: str = "bfloat16"):
    return jax.ShapeDtypeStruct(sizes, dtype)


PRODUCTS = [
    pytest.param(576, (576, 192, 192), "bfloat16", id="smollm2 q, k, v"),
    pytest.param(4096, (4096, 4096, 4096), "bfloat16", id="llama-2 7B q, k, v"),
    pytest.param(11008, (4096,), "bfloat16", id="llama-2 7B down"),
    pytest.param(768, (768, 768, 768), "float32", id="gpt2 q, k, v"),
]


@pytest.mark.parametrize("inputs, outputs, dtype, rows", diagonal(PRODUCTS, [1, 4]))
def test_products_compile_for_an_h200_without_spills(rows, inputs, outputs, dtype):
    x, weights = shape(rows, inputs, dtype=dtype), [shape(n, inputs, dtype=dtype) for n in outputs]
    lowers_for_cuda(skinny_matmul, x, weights)
    compiles_without_spills(skinny_matmul, x, weights)


@pytest.mark.parametrize("parts", ["outputs", "inputs"])
def test_live_parts_compile_for_an_h200_without_spills(parts):
    x, weight, live = shape(17, 4096), shape(4096, 4096), shape(32, dtype="bool")

    def run(x, weight, live, **options):
        return skinny_matmul(x, [weight], live=[live], parts=parts, **options)

    lowers_for_cuda(run, x, weight, live)
    compiles_without_spills(run, x, weight, live)


HIDDEN = [
    pytest.param(576, 1536, "bfloat16", "silu", id="smollm2"),
    pytest.param(4096, 11008, "bfloat16", "silu", id="llama-2 7B"),
    pytest.param(768, 3072, "float32", "gelu", id="an exact gelu"),
]


@pytest.mark.parametrize("width, neurons, dtype, activation, rows", diagonal(HIDDEN, [1, 4]))
def test_hidden_values_compile_for_an_h200_without_spills(rows, width, neurons, dtype, activation):
    x, weight = shape(rows, width, dtype=dtype), shape(neurons, width, dtype=dtype)
    run = functools.partial(feed_forward_hidden, activation=activation)
    lowers_for_cuda(run, x, weight, weight)
    compiles_without_spills(run, x, weight, weight)


def test_programs_fill_a_device_where_there_are_enough_outputs():
    assert heuristic(1, 4096, 11008, 2).outputs == 8
    assert heuristic(1, 576, 576, 2) == Config(rows=1, outputs=2, depth=1024)
    assert heuristic(4, 576, 576, 2).outputs == 16


def test_bad_input_is_named():
    x, w = jnp.zeros((2, 8)), jnp.zeros((4, 8))
    with pytest.raises(ValueError, match=r"weights\[1\] must have shape \[_, 8\], got \[4, 6\]"):
        skinny_matmul(x, [w, w[:, :6]])
    with pytest.raises(ValueError, match=r"the bias of weights\[0\] must have shape \[4\]"):
        skinny_matmul(x, [w], [jnp.zeros(3)])
    with pytest.raises(ValueError, match=r"divide the 4 outputs, got bool\[3\]"):
        skinny_matmul(x, [w], live=[jnp.ones(3, bool)])
    with pytest.raises(ValueError, match="2 weights and 1 biases"):
        skinny_matmul(x, [w, w], [None])
    with pytest.raises(ValueError, match="gate must hold floating numbers, got int32"):
        feed_forward_hidden(x, w, w.astype(int), activation="relu")
    with pytest.raises(ValueError, match="up must have the dtype of gate, bfloat16, got float32"):
        feed_forward_hidden(x, w, w.astype("bfloat16"), activation="relu")
    with pytest.raises(ValueError, match=r"up must have shape \[4, 8\], got \[3, 8\]"):
        feed_forward_hidden(x, w[:3], w, activation="relu")
    with pytest.raises(ValueError, match="activation must be one of"):
        feed_forward_hidden(x, w, activation="tanh")
    with pytest.raises(ValueError, match="gate_bias was given without gate"):
        feed_forward_hidden(x, w, activation="relu", gate_bias=w[:, 0])
    with pytest.raises(ValueError, match="outputs must be a power of two of at least 16, got 8"):
        Config(rows=16, outputs=8, depth=16)
