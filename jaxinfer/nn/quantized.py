"""Weights of 8 or 4 bits, which stand in a parameter tree where a floating weight [O, I] stood.

Two forms, because the machines differ:

- `Int8Weight`, for a CPU: codes of 8 bits, one scale per output. Activations are rounded to 8 bits
  too, one scale per row, so that the products are exact sums of integers: a row's result does not
  depend on what else is in the batch, be it the rest of a text or a tree of guesses.
- `PackedWeight`, for a GPU: codes of 4 or 8 bits with one scale per group of inputs, read by the
  kernel `pallas_kernels.weight_matmul`; activations keep 16 bits.

XLA CPU multiplies int8
fast where the weight is the left operand: 8 rows then take the time of two (jax 0.10.2, AVX2,
576 x 1536 and 576 x 49152), which is what trees of guesses need. Up to 16 rows are multiplied by
the kernel `jaxinfer.cpu_kernels.int8_product` where a backend has it, with equal results.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfer.cpu_kernels.int8_product import fits, int8_products
from jaxinfer.runtime.backend import Backend
from pallas_kernels.weight_matmul import dequantize_rows, dequantize_weight, weight_matmuls

MEMORY_BOUND_ROWS = 64  # more activations than this are worth a weight in full


@dataclass(frozen=True, kw_only=True)
class StoredWeight:
    """A weight [O, I] that is kept in another form; `dtype` is that of the model's computation,
    `origin` the fingerprint of the parameters that it was made from."""

    dtype: str = field(metadata={"static": True})
    origin: str = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        raise NotImplementedError

    def product(
        self, x: Float[Array, "... I"], backend: Backend | None = None
    ) -> Float[Array, "... O"]:
        """`x @ weight.T` in float32; without a `backend` by a kernel, if there is one, on a CUDA
        device."""
        raise NotImplementedError

    def rows(self, indices: Int[Array, "..."]) -> Float[Array, "... I"]:
        """Rows of the weight, in `dtype`."""
        raise NotImplementedError


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Int8Weight(StoredWeight):
    """w[o, i] = scale[o] * codes[o, i] / smooth[i], where there is a `smooth`.

    `axis` names the devices that divide the inputs (`Backend.axis`): a row of activations is then
    rounded by the largest of all of them.
    """

    codes: Any  # s8[O, I]
    scale: Any  # f32[O]
    smooth: Any = None  # f32[I], by which inputs are divided before they are rounded
    axis: str | None = field(default=None, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape

    def product(
        self, x: Float[Array, "... I"], backend: Backend | None = None
    ) -> Float[Array, "... O"]:
        return int8_weight_products(x, (self,), backend)[0]

    def rows(self, indices: Int[Array, "..."]) -> Float[Array, "... I"]:
        wide = self.codes[indices].astype(jnp.float32) * self.scale[indices][..., None]
        if self.smooth is not None:
            wide = wide / self.smooth
        return wide.astype(self.dtype)


def int8_weight_products(
    x: Float[Array, "... I"], weights: Sequence[Int8Weight], backend: Backend | None = None
) -> tuple[Float[Array, "... _"], ...]:
    """`product` of each; all that divide the inputs by nothing share a call of the kernel."""
    has_kernel = backend is not None and backend.cpu_kernels
    has_kernel = has_kernel and fits(math.prod(x.shape[:-1]), x.shape[-1])
    if not has_kernel or any(weight.axis is not None for weight in weights):
        return tuple(_int8_product(x, w.codes, w.scale, w.smooth, w.axis) for w in weights)
    if len(weights) > 1 and any(weight.smooth is not None for weight in weights):
        return tuple(weight.product(x, backend) for weight in weights)
    return _int8_products(x, weights[0].smooth, [(w.codes, w.scale) for w in weights])


@jax.jit  # traced once for all layers
def _int8_products(x: Array, smooth: Array | None, weights: list[tuple[Array, Array]]):
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    found = int8_products(rows if smooth is None else rows / smooth, weights)
    return tuple(y.reshape(*x.shape[:-1], y.shape[1]) for y in found)


@functools.partial(jax.jit, static_argnums=4)
def _int8_product(
    x: Array, weight: Array, weight_scale: Array, smooth: Array | None, axis: str | None
) -> Array:
    rows = x.reshape(-1, x.shape[-1])
    count = len(rows)
    if count == 1:  # XLA CPU multiplies a vector many times slower than two rows, and rounds it
        rows = jnp.pad(rows, ((0, 1), (0, 0)))  # in another order
    wide = rows.astype(jnp.float32)
    codes, scale = rounded_to_int8(wide if smooth is None else wide / smooth, axis)
    contract = (((1,), (1,)), ((), ()))
    sums = jax.lax.dot_general(weight, codes, contract, preferred_element_type=jnp.int32)
    # XLA would turn the operands round to save the transposition of this small result
    sums = jax.lax.optimization_barrier(sums).T
    y = sums.astype(jnp.float32) * (scale[:, None] * weight_scale)
    return y[:count].reshape(*x.shape[:-1], len(weight))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PackedWeight(StoredWeight):
    """A weight in the layout of the kernel `weight_matmul`."""

    packed: Any  # pallas_kernels.weight_matmul.QuantizedWeight

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape

    def product(
        self, x: Float[Array, "... I"], backend: Backend | None = None
    ) -> Float[Array, "... O"]:
        return packed_products(x, (self,), backend)[0]

    def rows(self, indices: Int[Array, "..."]) -> Float[Array, "... I"]:
        return dequantize_rows(self.packed, indices).astype(self.dtype)


def packed_products(
    x: Float[Array, "... I"], weights: Sequence[PackedWeight], backend: Backend | None = None
) -> tuple[Float[Array, "... _"], ...]:
    """`product` of each; those of one form in one launch."""
    rows = x.reshape(-1, x.shape[-1])
    forms = {(w.packed.bits, w.packed.group) for w in weights}
    if len(forms) > 1:
        return tuple(weight.product(x, backend) for weight in weights)
    if rows.shape[0] > MEMORY_BOUND_ROWS:

        def product(weight: PackedWeight) -> Array:
            whole = dequantize_weight(weight.packed).astype(weight.dtype)
            rounded = rows.astype(jnp.bfloat16).astype(weight.dtype)  # as the kernel does
            return jnp.einsum("ri,oi->ro", rounded, whole, preferred_element_type=jnp.float32)

        found = tuple(map(product, weights))
    else:
        packed = [weight.packed for weight in weights]
        implementation = None if backend is None else backend.implementation
        found = weight_matmuls(rows, packed, implementation=implementation)
    return tuple(y.reshape(*x.shape[:-1], y.shape[-1]) for y in found)


def size_of(tree: Any) -> int:
    """Numbers in a tree of parameters; a stored weight counts as the one it stands for, and what
    was divided into a norm not at all."""
    leaves = jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda x: isinstance(x, StoredWeight)
    )
    return sum(math.prod(x.shape) for path, x in leaves if not is_divisor(path))


def is_divisor(path: tuple[Any, ...]) -> bool:
    """Whether the leaf at a path is what was divided into a norm."""
    return bool(path) and getattr(path[-1], "key", None) == "divisor"


def rounded_to_int8(
    x: Float[Array, "R I"], axis: str | None = None
) -> tuple[Int[Array, "R I"], Float[Array, " R"]]:
    """Codes from -127 to 127 and one scale per row, so that x is about codes * scale; of inputs
    that devices divide (`Int8Weight.axis`) one scale for all."""
    largest = jnp.abs(x).max(axis=1)
    if axis is not None:
        largest = jax.lax.pmax(largest, axis)
    scale = jnp.maximum(largest, 1e-30) * (1 / 127)  # a quotient's last bit is not always the same
    return jnp.round(x / scale[:, None]).astype(jnp.int8), scale
