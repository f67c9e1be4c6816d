"""Products of activations with weights [outputs, inputs], the layout of most checkpoints.

For a few rows (a batch, a tree, a short chunk) XLA CPU multiplies two to four times faster with the
weight as the left operand: 8 rows then take little more time than one. It would turn the operands
round again to save the transposition of the small result, which a barrier forbids.
"""

import math

import jax
from jaxtyping import Array, Float

from jaxinfer.typing import Params

FEW_ROWS = 64  # from 2 to so many rows (XLA CPU, jax 0.10.2, float32, 576 x 1536 and 576 x 49152)


def linear(params: Params, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
    """`x @ weight.T + bias` with weight [O, I]."""
    y = product(x, params["weight"])
    return y + params["bias"] if "bias" in params else y


def product(
    x: Float[Array, "... I"], weight: Float[Array, "O I"], dtype: jax.typing.DTypeLike | None = None
) -> Float[Array, "... O"]:
    """`x @ weight.T`, without a transposed copy of the weight, in `dtype` if it is given."""

    def rows_first(x: Array, weight: Array) -> Array:
        contract = (((x.ndim - 1,), (1,)), ((), ()))
        return jax.lax.dot_general(x, weight, contract, preferred_element_type=dtype)

    def weight_first(x: Array, weight: Array) -> Array:
        rows = x.reshape(-1, x.shape[-1])
        contract = (((1,), (1,)), ((), ()))
        y = jax.lax.dot_general(weight, rows, contract, preferred_element_type=dtype)
        return jax.lax.optimization_barrier(y).T.reshape(*x.shape[:-1], weight.shape[0])

    if 1 < math.prod(x.shape[:-1]) <= FEW_ROWS:
        return jax.lax.platform_dependent(x, weight, cpu=weight_first, default=rows_first)
    return rows_first(x, weight)
