"""Products of activations with weights [outputs, inputs], the layout of most checkpoints.

For a few rows (a batch, a tree, a short chunk) XLA CPU multiplies two to four times faster with the
weight as the left operand: 8 rows then take little more time than one. It would turn the operands
round again to save the transposition of the small result, which a barrier forbids. Where a weight
stays in a core's cache, its product with each row by itself is faster still, up to 8 rows.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfer.nn.quantized import StoredWeight
from jaxinfer.typing import Params

SINGLE_ROWS, CACHED_BYTES = 8, 1 << 19  # rows one by one, of a weight that a core's cache holds
FEW_ROWS = 64  # from 2 to so many rows (XLA CPU, jax 0.10.2, float32, 576 x 1536 and 576 x 49152)


def linear(params: Params, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
    """`x @ weight.T + bias` with weight [O, I], floating or stored in fewer bits."""
    y = product(x, params["weight"])
    return y + params["bias"] if "bias" in params else y


def product(
    x: Float[Array, "... I"],
    weight: Float[Array, "O I"] | StoredWeight,
    dtype: jax.typing.DTypeLike | None = None,
) -> Float[Array, "... O"]:
    """`x @ weight.T`, without a transposed copy of the weight, in `dtype` if it is given."""
    if isinstance(weight, StoredWeight):
        return weight.product(x).astype(dtype or x.dtype)
    if 1 < math.prod(x.shape[:-1]) <= FEW_ROWS:
        return _few_rows(x, weight, dtype)
    return _rows_first(x, weight, dtype)


def rows(
    weight: Float[Array, "O I"] | StoredWeight, indices: Int[Array, "..."]
) -> Float[Array, "... I"]:
    """Rows of a weight, as an embedding looks them up."""
    return weight.rows(indices) if isinstance(weight, StoredWeight) else weight[indices]


@functools.partial(jax.jit, static_argnums=2)  # traced once for all layers
def _few_rows(x: Array, weight: Array, dtype: jax.typing.DTypeLike | None) -> Array:
    count = math.prod(x.shape[:-1])
    one_by_one = count <= SINGLE_ROWS and weight.nbytes <= CACHED_BYTES
    on_cpu, rows_first = (
        functools.partial(f, dtype=dtype)
        for f in (_row_by_row if one_by_one else _weight_first, _rows_first)
    )
    return jax.lax.platform_dependent(x, weight, cpu=on_cpu, default=rows_first)


def _rows_first(x: Array, weight: Array, dtype: jax.typing.DTypeLike | None) -> Array:
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, contract, preferred_element_type=dtype)


def _weight_first(x: Array, weight: Array, dtype: jax.typing.DTypeLike | None) -> Array:
    y = _rows_first(weight, x.reshape(-1, x.shape[-1]), dtype)
    return jax.lax.optimization_barrier(y).T.reshape(*x.shape[:-1], weight.shape[0])


def _row_by_row(x: Array, weight: Array, dtype: jax.typing.DTypeLike | None) -> Array:
    rows = jax.lax.optimization_barrier(tuple(x.reshape(-1, x.shape[-1])))  # else merged again
    y = jnp.stack(jax.lax.optimization_barrier([_rows_first(row, weight, dtype) for row in rows]))
    return y.reshape(*x.shape[:-1], weight.shape[0])
