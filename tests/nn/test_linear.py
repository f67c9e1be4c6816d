"""Products with few rows: the same numbers, with the weight as the left operand on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.nn import linear as module
from jaxinfer.nn.linear import (
    CACHED_BYTES,
    FEW_ROWS,
    PART_ROWS,
    SINGLE_ROWS,
    input_major_product,
    linear,
    product,
)

INPUTS, OUTPUTS = 24, 40


def operands(*rows: int):
    x = jax.random.normal(jax.random.key(0), (*rows, INPUTS))
    return x, jax.random.normal(jax.random.key(1), (OUTPUTS, INPUTS))


@pytest.mark.parametrize("rows", [(1, 1), (2, 1), (1, 8), (3, 5), (FEW_ROWS,), (FEW_ROWS + 1,)])
def test_any_number_of_rows_gives_the_same_product(rows):
    x, weight = operands(*rows)
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    found = jax.jit(product)(x, weight)
    assert found.shape == (*rows, OUTPUTS)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    biased = linear({"weight": weight, "bias": jnp.ones(OUTPUTS)}, x)
    np.testing.assert_allclose(biased, expected + 1, atol=1e-4)


def test_the_result_may_be_wider_than_the_operands():
    x, weight = (y.astype(jnp.bfloat16) for y in operands(4))
    assert product(x, weight, jnp.float32).dtype == jnp.float32
    assert product(x, weight).dtype == jnp.bfloat16


def test_gradients_pass_through():
    x, weight = operands(4)
    few = jax.grad(lambda x, w: jnp.square(product(x, w)).sum(), argnums=(0, 1))(x, weight)
    plain = jax.grad(lambda x, w: jnp.square(x @ w.T).sum(), argnums=(0, 1))(x, weight)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), few, plain)


def test_a_cpu_has_the_weight_on_the_left_and_a_gpu_the_rows():
    x, weight = operands(8)
    weight = jnp.tile(weight, (CACHED_BYTES // weight.nbytes + 1, 1))  # no core's cache holds it
    traced = jax.jit(product).trace(x, weight)
    texts = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "cuda")}
    left, right = f"tensor<{len(weight)}x{INPUTS}xf32>", f"tensor<8x{INPUTS}xf32>"
    assert f"({left}, {right}) ->" in texts["cpu"] and "optimization_barrier" in texts["cpu"]
    assert f"({right}, {left}) ->" in texts["cuda"] and "optimization_barrier" not in texts["cuda"]


@pytest.mark.parametrize("rows", [2, SINGLE_ROWS, SINGLE_ROWS + 1])
def test_a_cpu_multiplies_a_small_weight_with_each_of_a_few_rows(rows):
    x, weight = operands(rows)
    text = jax.jit(product).lower(x, weight).as_text()
    each = f"(tensor<{INPUTS}xf32>, tensor<{OUTPUTS}x{INPUTS}xf32>) ->"
    assert text.count(each) == (rows if rows <= SINGLE_ROWS else 0)


@pytest.mark.parametrize("inputs, parts", [(48, 6), (40, 5), (47, 1), (16, 2)])
@pytest.mark.parametrize("rows", [1, 3, PART_ROWS, PART_ROWS + 1])
def test_a_weight_of_inputs_is_multiplied_in_parts_that_a_cache_holds(
    inputs, parts, rows, monkeypatch
):
    monkeypatch.setattr(module, "PART_BYTES", 8 * OUTPUTS * 4)
    x = jax.random.normal(jax.random.key(0), (rows, inputs))
    weight = jax.random.normal(jax.random.key(1), (inputs, OUTPUTS))
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64)
    np.testing.assert_allclose(jax.jit(input_major_product)(x, weight), expected, atol=1e-4)
    traced = jax.jit(input_major_product).trace(x, weight)
    texts = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "cuda")}
    part = f"tensor<{parts}x{inputs // parts}x{OUTPUTS}xf32>"
    assert (part in texts["cpu"]) == (parts > 1 and rows <= PART_ROWS)
    assert part not in texts["cuda"]
    slope = jax.grad(lambda x: jnp.square(input_major_product(x, weight)).sum())(x)
    np.testing.assert_allclose(slope, 2 * expected @ np.asarray(weight).T, rtol=1e-4, atol=1e-2)
