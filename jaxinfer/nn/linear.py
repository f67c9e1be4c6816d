"""Products of activations with weights [outputs, inputs], the layout of most checkpoints.

For a few rows (a batch, a tree, a short chunk) XLA CPU multiplies two to four times faster with the
weight as the left operand: 8 rows then take little more time than one. It would turn the operands
round again to save the transposition of the small result, which a barrier forbids. Where a weight
stays in a core's cache, its product with each row by itself is faster still, up to 8 rows.

A weight that is kept [inputs, outputs], so that all an input is multiplied with is contiguous, XLA
CPU multiplies at half that rate: `input_major_product` does better.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfer.nn.quantized import (
    Int8Weight,
    PackedWeight,
    StoredWeight,
    int8_weight_products,
    packed_products,
)
from jaxinfer.runtime.backend import Backend
from jaxinfer.typing import Params
from pallas_kernels.skinny_matmul import skinny_matmul

SINGLE_ROWS, CACHED_BYTES = 8, 1 << 19  # rows one by one, of a weight that a core's cache holds
# Rows, and numbers of a weight. The sparse block's kernel, which reads weights like this one, took
# 0.7 of XLA's time on an H200 for 4096 x 11008 and 1 row, the same for 16 rows; for 8192 x 28672
# 1.7 and 1.3 times as long.
SKINNY_ROWS, SKINNY_NUMBERS = 16, 1 << 26
FEW_ROWS = 64  # from 2 to so many rows (XLA CPU, jax 0.10.2, float32, 576 x 1536 and 576 x 49152)

# Rows of a weight [inputs, outputs] that is multiplied in parts of its inputs, and bytes of a part
# (XLA CPU, jax 0.10.2, float32, CPU time of 4096 x 1024: 1.4, 1.9, 2.2 ms for 1, 4, 8 rows in
# parts, 2.1, 3.1, 4.1 whole, 1.3, 1.7, 1.8 as [outputs, inputs]; from 32 rows on whole is faster).
PART_ROWS, PART_BYTES, LEAST_PART = 16, 1 << 18, 8


def linear(
    params: Params, x: Float[Array, "... I"], backend: Backend | None = None
) -> Float[Array, "... O"]:
    """`x @ weight.T + bias` with weight [O, I], floating or stored in fewer bits."""
    return linears((params,), x, backend)[0]


def linears(
    many: Sequence[Params],
    x: Float[Array, "... I"],
    backend: Backend | None = None,
) -> tuple[Float[Array, "... _"], ...]:
    """`linear` of each; few rows (`is_skinny`) by one kernel on a CUDA device.

    Without a `backend` floating weights are multiplied by XLA, since the kernel has no gradient,
    and stored ones by their kernel on a CUDA device. The kernel has a reference of its own beside
    `product`, whose forms for XLA CPU neither accumulate the bias in float32 nor take several
    weights.
    """

    weights = [params["weight"] for params in many]
    if backend is not None and backend.has_kernels and is_skinny(x, many):
        biases = [params.get("bias") for params in many]
        return skinny_matmul(x, weights, biases, implementation=backend.implementation)
    found = products(x, weights, backend)
    return tuple(
        y + params["bias"] if "bias" in params else y for y, params in zip(found, many, strict=True)
    )


def is_skinny(x: Float[Array, "... I"], many: Sequence[Params]) -> bool:
    """Whether a kernel reads such floating weights faster for so few rows than XLA:GPU does: those
    that are so small that launches count. Large ones XLA reads at nine tenths of the bandwidth."""
    weights = [params["weight"] for params in many]
    if math.prod(x.shape[:-1]) > SKINNY_ROWS or any(isinstance(w, StoredWeight) for w in weights):
        return False
    return all(w.dtype == x.dtype and w.size <= SKINNY_NUMBERS for w in weights)


def products(
    x: Float[Array, "... I"],
    weights: Sequence[Float[Array, "_ I"] | StoredWeight],
    backend: Backend | None = None,
) -> tuple[Float[Array, "... _"], ...]:
    """`product` of each."""
    packed = [weight for weight in weights if isinstance(weight, PackedWeight)]
    rounded = [weight for weight in weights if isinstance(weight, Int8Weight)]
    if len(packed) == len(weights):
        return tuple(y.astype(x.dtype) for y in packed_products(x, packed, backend))
    if len(rounded) == len(weights):
        return tuple(y.astype(x.dtype) for y in int8_weight_products(x, rounded, backend))
    return tuple(product(x, weight, backend=backend) for weight in weights)


def product(
    x: Float[Array, "... I"],
    weight: Float[Array, "O I"] | StoredWeight,
    dtype: jax.typing.DTypeLike | None = None,
    backend: Backend | None = None,
) -> Float[Array, "... O"]:
    """`x @ weight.T`, without a transposed copy of the weight, in `dtype` if it is given.

    `backend` is for stored weights, see `linears`; floating ones are multiplied by XLA.
    """
    if isinstance(weight, StoredWeight):
        return weight.product(x, backend).astype(dtype or x.dtype)
    if 1 < math.prod(x.shape[:-1]) <= FEW_ROWS:
        return _few_rows(x, weight, dtype)
    return _rows_first(x, weight, dtype)


def input_major_product(x: Float[Array, "R I"], weight: Float[Array, "I O"]) -> Float[Array, "R O"]:
    """`x @ weight` in float32."""
    parts = _parts(weight) if len(x) <= PART_ROWS else 1
    return _whole(x, weight) if parts == 1 else _in_parts(x, weight, parts)


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


def _parts(weight: Array) -> int:
    """Into how many equal parts of its inputs a weight is cut, each as large as `PART_BYTES` or
    smaller; 1 where no such number divides the inputs."""
    inputs = len(weight)
    least = -(-weight.nbytes // PART_BYTES)
    return next((n for n in range(least, inputs // LEAST_PART + 1) if inputs % n == 0), 1)


def _whole(x: Array, weight: Array) -> Array:
    return jnp.matmul(x, weight, preferred_element_type=jnp.float32)


@functools.partial(jax.jit, static_argnums=2)  # traced once for all layers
def _in_parts(x: Array, weight: Array, parts: int) -> Array:
    def on_cpu(x: Array, weight: Array) -> Array:
        some = x.reshape(len(x), parts, -1).swapaxes(0, 1)
        each = jnp.matmul(some, weight.reshape(parts, -1, weight.shape[1]),
                          preferred_element_type=jnp.float32)  # fmt: skip
        return each.sum(axis=0)

    return jax.lax.platform_dependent(x, weight, cpu=on_cpu, default=_whole)
