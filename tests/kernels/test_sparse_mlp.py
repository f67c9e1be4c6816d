"""Sparse feed-forward block: reference, interpret mode, CUDA."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.sparse_mlp import sparse_mlp
from pallas_kernels.sparse_mlp.configs import Config
from tests.kernels.checking import agree, compiles_without_spills, lowers_for_cuda

KINDS = ("one row", "shared list", "list per row")
TILES = Config(neurons=16, depth=32, columns=16, chain=16, splits=3)


def problem(seed: int):
    """Random shapes and arguments. What must not be read is NaN: every neuron that no list holds;
    list entries behind the count point anywhere."""
    rng = np.random.default_rng(seed)
    kind = KINDS[seed % 3]
    d, f, size = int(rng.choice([16, 40, 96])), int(rng.integers(1, 200)), int(rng.integers(1, 40))
    size = int(rng.choice([size, 1, 16, 32]))
    b = {"one row": 1, "shared list": int(rng.integers(1, 70)), "list per row": 3}[kind]
    dtype, total = rng.choice(["float32", "bfloat16"]), math.ceil(f / size)
    cap = int(rng.integers(1, total + 1))
    shape = (b,) if kind == "list per row" else ()
    count = np.asarray(rng.integers(0, cap + 1, shape))
    blocks = np.stack([rng.permutation(total)[:cap] for _ in range(b)]).reshape(*shape, -1, cap)
    blocks = blocks[0] if not shape else blocks[:, 0]
    wild = rng.choice([-(2**31), -1, total, 2**31 - 1], blocks.shape)
    blocks = np.where(np.arange(cap) < count[..., None], blocks, wild)
    row_mask = None if shape or rng.random() < 0.3 else rng.random((b, cap)) < 0.6

    read = set(blocks[np.arange(cap) < count[..., None]].tolist())
    poison = np.asarray([neuron // size not in read for neuron in range(f)])

    def some(*shape):
        x = rng.normal(size=shape)
        if shape[0] == f:
            x[poison] = np.nan
        return jnp.asarray(x, dtype)

    def maybe(*shape):
        return some(*shape) if rng.random() < 0.5 else None

    gate = maybe(f, d)
    arrays = {
        "x": jnp.asarray(rng.normal(size=(b, d)) / d**0.5, dtype),
        "gate": gate,
        "up": some(f, d),
        "down": some(f, d),
        "blocks": jnp.asarray(blocks, jnp.int32),
        "count": jnp.asarray(count, jnp.int32),
        "row_mask": None if row_mask is None else jnp.asarray(row_mask),
        "up_bias": maybe(f),
        "gate_bias": None if gate is None else maybe(f),
        "down_bias": jnp.asarray(rng.normal(size=d), dtype) if rng.random() < 0.5 else None,
    }
    static = {
        "block_size": size,
        "activation": str(rng.choice(["silu", "gelu", "gelu_tanh", "relu"])),
        "config": rng.choice([None, TILES]),
    }
    return arrays, static, 1e-5 if dtype == "float32" else 2e-2


def runner(arrays, static):
    """`sparse_mlp` as a function of the arrays in order."""

    def run(*given, implementation=None):
        return sparse_mlp(
            **dict(zip(arrays, given, strict=True)), **static, implementation=implementation
        )

    return run


QUICK, ALL = range(3), [pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 60)]


@pytest.mark.parametrize("seed", [*QUICK, *ALL])
def test_the_kernel_agrees_with_its_reference(seed):
    arrays, static, tolerance = problem(seed)
    agree(runner(arrays, static), *arrays.values(), tolerance=tolerance)


def masked_dense(arrays, *, block_size, activation):
    """In float64, all neurons, and the unwanted ones set to zero."""
    a = {name: None if x is None else np.asarray(x, np.float64) for name, x in arrays.items()}
    f = len(a["up"])
    act = {
        "silu": lambda x: x / (1 + np.exp(-x)),
        "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / 2**0.5)) / 2,
        "gelu_tanh": lambda x: x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
        "relu": lambda x: np.maximum(x, 0),
    }[activation]

    def project(name):
        bias = a.get(f"{name}_bias")
        return a["x"] @ np.nan_to_num(a[name]).T + (0 if bias is None else np.nan_to_num(bias))

    h = act(project("up")) if a["gate"] is None else act(project("gate")) * project("up")
    wanted = np.zeros((len(a["x"]), f), bool)
    for row, keep in enumerate(wanted):
        each = arrays["blocks"].ndim == 2
        count = int(arrays["count"][row] if each else arrays["count"])
        blocks = np.asarray(arrays["blocks"][row] if each else arrays["blocks"])[:count]
        if a["row_mask"] is not None:
            blocks = blocks[np.asarray(arrays["row_mask"])[row, :count]]
        for block in blocks:
            keep[block * block_size : (block + 1) * block_size] = True
    y = np.where(wanted, h, 0) @ np.nan_to_num(a["down"])
    return y if a["down_bias"] is None else y + a["down_bias"]


@pytest.mark.parametrize("seed", [*range(3, 9), *ALL[6:]])
def test_the_reference_is_a_dense_block_with_a_mask(seed):
    arrays, static, tolerance = problem(seed)
    static.pop("config")
    found = sparse_mlp(**arrays, **static, implementation="reference")
    expected = masked_dense(arrays, **static)
    scale = max(np.abs(expected).max(), 1e-30)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale)


def test_a_row_does_not_depend_on_who_shares_the_list():
    rng = np.random.default_rng(0)
    x, up, down = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((4, 32), (64, 32), (64, 32))
    )
    row_mask = jnp.asarray(rng.random((4, 4)) < 0.5)
    blocks, count = jnp.arange(4, dtype=jnp.int32), jnp.asarray(4, jnp.int32)
    run = functools.partial(sparse_mlp, block_size=16, activation="silu")
    together = run(x, up, up, down, blocks, count, row_mask=row_mask)
    order = jnp.argsort(~row_mask, axis=1, stable=True).astype(jnp.int32)  # wanted blocks first
    alone = run(x, up, up, down, order, row_mask.sum(axis=1))
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5 * float(jnp.abs(alone).max()))


SHAPES = [
    pytest.param(1, 576, 1536, "bfloat16", id="smollm2, one row"),
    pytest.param(16, 576, 1536, "bfloat16", id="smollm2, 16 rows"),
    pytest.param(1, 4096, 11008, "bfloat16", id="llama-2, one row"),
    pytest.param(16, 4096, 11008, "bfloat16", id="llama-2, 16 rows"),
    pytest.param(64, 4096, 11008, "bfloat16", id="64 rows", marks=pytest.mark.slow),
    pytest.param(1, 960, 2560, "float32", id="float32, one row", marks=pytest.mark.slow),
    pytest.param(5, 960, 2560, "float32", id="float32, 5 rows", marks=pytest.mark.slow),
    pytest.param(64, 960, 2560, "float32", id="float32, 64 rows", marks=pytest.mark.slow),
]


def shapes(b, d, f, dtype, blocks=(), count=()):
    def array(*shape, of=dtype):
        return jax.ShapeDtypeStruct(shape, of)

    w = array(f, d)
    return array(b, d), w, w, w, array(*blocks, of="int32"), array(*count, of="int32")


@pytest.mark.parametrize("b, d, f, dtype", SHAPES)
def test_it_compiles_for_an_h200_without_spills(b, d, f, dtype):
    args = shapes(b, d, f, dtype, blocks=(f // 32,))
    run = functools.partial(sparse_mlp, block_size=32, activation="silu")
    lowers_for_cuda(run, *args, calls=2)
    compiles_without_spills(run, *args)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("b", [1, 4])
def test_a_plain_block_with_biases_compiles_for_an_h200(activation, b):
    x, _, up, down, blocks, count = shapes(b, 768, 3072, "bfloat16", blocks=(b, 96), count=(b,))
    bias = jax.ShapeDtypeStruct((3072,), "bfloat16")

    def run(x, up, down, blocks, count, bias):
        return sparse_mlp(
            x, None, up, down, blocks, count,
            block_size=32, activation=activation, up_bias=bias, down_bias=bias[:768],
        )  # fmt: skip

    compiles_without_spills(run, x, up, down, blocks, count, bias)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": (2, 8)}, r"x must have shape \[_, 16\], got \[2, 8\]"),
        ({"down": (16, 40)}, r"down must have shape \[40, 16\], got \[16, 40\]"),
        ({"gate": (40, 8)}, r"gate must have shape \[40, 16\], got \[40, 8\]"),
        ({"count": (2,)}, r"count must have shape \[\], got \[2\]"),
        ({"blocks": (3, 5)}, r"blocks must have shape \[2, _\], got \[3, 5\]"),
        ({"blocks": (2, 5)}, r"count must have shape \[2\], got \[\]"),
        ({"row_mask": (2, 4)}, r"row_mask must have shape \[2, 5\], got \[2, 4\]"),
        ({"blocks": (2, 5), "count": (2,), "row_mask": (2, 5)}, r"row_mask .* got lists \[2, 5\]"),
        ({"up_bias": (16,)}, r"up_bias must have shape \[40\], got \[16\]"),
        ({"down_bias": (40,)}, r"down_bias must have shape \[16\], got \[40\]"),
        ({"gate": None, "gate_bias": (40,)}, "gate_bias was given without gate"),
        ({"block_size": 0}, "block_size 0"),
        ({"activation": "swish"}, "activation must be one of 'silu', .*, got 'swish'"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    given = {"x": (2, 16), "gate": (40, 16), "up": (40, 16), "down": (40, 16)}
    given |= {"blocks": (5,), "count": ()}
    given |= {"block_size": 8, "activation": "silu"} | change
    kinds = {"blocks": jnp.int32, "count": jnp.int32, "row_mask": bool}
    arrays = {
        name: jnp.zeros(x, kinds.get(name, jnp.float32)) if isinstance(x, tuple) else x
        for name, x in given.items()
    }
    with pytest.raises(ValueError, match=message):
        sparse_mlp(**arrays)


def test_dtypes_are_checked():
    x, w = jnp.zeros((2, 16)), jnp.zeros((40, 16))
    blocks, count = jnp.zeros(5, jnp.int32), jnp.asarray(0)
    run = functools.partial(sparse_mlp, block_size=8, activation="silu")
    with pytest.raises(ValueError, match="down must have the dtype of up, float32, got bfloat16"):
        run(x, w, w, w.astype(jnp.bfloat16), blocks, count)
    with pytest.raises(ValueError, match="blocks must be integers, got float32"):
        run(x, w, w, w, blocks.astype(jnp.float32), count)
