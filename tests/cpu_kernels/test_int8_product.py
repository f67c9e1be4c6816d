"""Products of rows rounded to 8 bits: every instruction set against whole numbers in numpy."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.cpu_kernels import int8_product as kernel
from jaxinfer.cpu_kernels.int8_product.api import MOST_ROWS
from jaxinfer.nn.quantized import Int8Weight
from tests.cpu_kernels.using import computing, every_set, needs_kernels

pytestmark = needs_kernels

ODD_SIZES = [(1, 1, 1), (16, 63, 5), (3, 64, 4), (7, 65, 3), (2, 31, 9), (5, 33, 1), (4, 16, 2)]


def int8_products(x, weights):
    return kernel.int8_products(jnp.asarray(x), jax.tree.map(jnp.asarray, weights))


def exact(x, codes, scale):
    """The product as it is defined, sums in 64 bits."""
    with np.errstate(invalid="ignore"):
        row_scale = np.maximum(np.abs(x).max(axis=1), np.float32(1e-30)) * np.float32(1 / 127)
        rounded = np.nan_to_num(np.rint(x / row_scale[:, None])).astype(np.int64)
        sums = (rounded @ codes.astype(np.int64).T).astype(np.float32)
        return sums * (row_scale[:, None] * scale)


def weight(rng, outputs, inputs):
    codes = rng.integers(-128, 128, (outputs, inputs), dtype=np.int8)
    return codes, rng.normal(size=outputs).astype(np.float32)


def problem(seed):
    rng = np.random.default_rng(seed)
    if seed < len(ODD_SIZES):
        rows, inputs, *outputs = ODD_SIZES[seed]
    else:
        rows, inputs = int(rng.integers(1, MOST_ROWS + 1)), int(rng.integers(1, 700))
        outputs = [int(n) for n in rng.integers(1, 300, rng.integers(1, 4))]
    x = rng.normal(size=(rows, inputs)).astype(np.float32) * np.float32(10.0 ** rng.integers(-3, 3))
    if seed % 5 == 0:
        x[rng.integers(rows)] = 0
    return x, [weight(rng, n, inputs) for n in outputs]


@every_set
def test_the_kernel_is_exact(instructions):
    with computing(instructions):
        for seed in range(44):
            x, weights = problem(seed)
            for y, one in zip(int8_products(x, weights), weights, strict=True):
                np.testing.assert_array_equal(y, exact(x, *one), str(seed))


@every_set
def test_the_largest_codes_do_not_overflow(instructions):
    x = np.full((2, 65536), 127, np.float32) * np.array([[1], [-1]], np.float32)
    codes = np.full((3, 65536), -128, np.int8)
    codes[1] = 127
    scale = np.ones(3, np.float32)
    with computing(instructions):
        (y,) = int8_products(x, [(codes, scale)])
    np.testing.assert_array_equal(y, exact(x, codes, scale))


@every_set
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_has_no_finite_result_and_spoils_no_other(instructions, odd):
    x, weights = problem(11)
    wanted = [exact(x, *one) for one in weights]
    spoiled = x.copy()
    spoiled[1, -1] = odd
    with computing(instructions):
        found = int8_products(spoiled, weights)
    assert len(x) > 2
    for y, exactly in zip(found, wanted, strict=True):
        assert not np.isfinite(y[1]).any()
        np.testing.assert_array_equal(np.delete(y, 1, 0), np.delete(exactly, 1, 0))


def test_the_form_for_xla_gives_the_same_bits():
    for seed in (0, 8, 9, 20):
        x, weights = problem(seed)
        for codes, scale in weights:
            stored = Int8Weight(
                codes=jnp.asarray(codes), scale=jnp.asarray(scale), dtype="float32", origin=""
            )
            found = jax.jit(stored.product)(x)
            np.testing.assert_array_equal(found, exact(x, codes, scale))


def large():
    rng = np.random.default_rng(7)
    return rng.normal(size=(3, 1000)).astype(np.float32), [
        weight(rng, n, 1000) for n in (1201, 3, 999)
    ]


@pytest.mark.parametrize("threads", [1, 2, 0])
def test_the_number_of_threads_changes_nothing(threads):
    x, weights = large()
    with computing(threads=threads):
        found = int8_products(x, weights)
    for y, one in zip(found, weights, strict=True):
        np.testing.assert_array_equal(y, exact(x, *one))


def test_calls_from_many_threads_end_and_are_right():
    x, weights = large()
    wanted, run = [exact(x, *one) for one in weights], jax.jit(int8_products)
    run(x, weights)
    wrong = []

    def work():
        for _ in range(20):
            found = run(x, weights)
            wrong.extend(
                i for i, y in enumerate(found) if not np.array_equal(np.asarray(y), wanted[i])
            )

    workers = [threading.Thread(target=work, daemon=True) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert not any(worker.is_alive() for worker in workers) and not wrong


def test_operands_that_do_not_fit_are_refused():
    x, codes, scale = np.ones((1, 8), np.float32), np.ones((4, 9), np.int8), np.ones(4, np.float32)
    with pytest.raises(jax.errors.JaxRuntimeError, match="shapes do not fit"):
        jax.block_until_ready(_unchecked(x, codes, scale))
    with pytest.raises(jax.errors.JaxRuntimeError, match="1 to 16 rows"):
        jax.block_until_ready(_unchecked(np.ones((17, 9), np.float32), codes, scale))


def _unchecked(x, codes, scale):
    out = jax.ShapeDtypeStruct((len(x), len(codes)), jnp.float32)
    return jax.ffi.ffi_call("jaxinfer_int8_product", [out])(x, codes, scale)
