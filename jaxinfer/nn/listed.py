"""Products of a few rows with the listed parts of a weight.

A weight [outputs, inputs] is cut into J equal parts of its outputs (a head of queries is one) or of
its inputs (what a head adds to a layer's output). On a CUDA device the kernel
`pallas_kernels.skinny_matmul` reads the listed parts alone. On a CPU a loop takes them one after
another. Parts of inputs are columns of a weight, so that reading one reads short pieces of every
row; `InputMajor` keeps such a weight transposed. Measured with XLA CPU, jax 0.10.2, float32, a
query and an output projection of width 768 to 2048: with a quarter of the parts 2.0 to 2.4 times
faster than the dense products, with half of them 1.0 to 1.4, with three quarters slower; the
output projection left as it is, 1.3 to 1.8 with a quarter, and slower with half.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from jaxinfer.nn.block_mlp import union_list
from jaxinfer.nn.linear import input_major_product, product
from jaxinfer.nn.quantized import StoredWeight
from jaxinfer.runtime.backend import Backend
from jaxinfer.typing import Leaf, Params
from pallas_kernels.skinny_matmul import skinny_matmul


class Listing(NamedTuple):
    """Which of J parts any row uses; their numbers in front, and how many they are."""

    used: Leaf  # bool[J]
    parts: Leaf  # i32[J]
    count: Leaf  # i32[]

    @classmethod
    def of(cls, selected: Bool[Array, "R J"]) -> "Listing":
        blocks, live, _ = union_list(selected)
        return cls(used=selected.any(axis=0), parts=blocks, count=live)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class InputMajor(StoredWeight):
    """A floating weight [O, I] as [I, O]: all that an input is multiplied with is contiguous."""

    weight: Any

    @classmethod
    def of(cls, weight: Float[Array, "O I"]) -> "InputMajor":
        return cls(weight=weight.T, dtype=str(weight.dtype), origin="")

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[::-1]

    def product(
        self, x: Float[Array, "... I"], backend: Backend | None = None
    ) -> Float[Array, "... O"]:
        y = input_major_product(x.reshape(-1, x.shape[-1]), self.weight)
        return y.reshape(*x.shape[:-1], -1)

    def rows(self, indices: Any) -> Float[Array, "... I"]:
        return self.weight.T[indices]


def has_parts(weight: Leaf, dtype: DTypeLike, backend: Backend, axis: int) -> bool:
    """Whether listed parts of the outputs (`axis` 0) or of the inputs (1) of a weight can be read
    alone; `dtype` is that of what it is multiplied with."""
    if isinstance(weight, StoredWeight):
        return axis == 1 and isinstance(weight, InputMajor) and not backend.has_kernels
    return weight.dtype == dtype if backend.has_kernels else axis == 0


def listed_outputs(
    many: Sequence[Params], x: Float[Array, "R I"], listing: Listing, backend: Backend
) -> tuple[Float[Array, "R _"], ...]:
    """`jaxinfer.nn.linear.linears` with the listed parts of each weight's outputs; the others are
    only their bias, or 0."""
    weights = [params["weight"] for params in many]
    if backend.has_kernels:
        return skinny_matmul(
            x, weights, [params.get("bias") for params in many], live=[listing.used] * len(many),
            implementation=backend.implementation,
        )  # fmt: skip
    sizes = [weight.shape[0] // len(listing.parts) for weight in weights]

    def body(index: Array, found: tuple[Array, ...]) -> tuple[Array, ...]:
        part, new = listing.parts[index], []
        for y, weight, size in zip(found, weights, sizes, strict=True):
            here = jax.lax.dynamic_slice_in_dim(weight, part * size, size)
            new.append(jax.lax.dynamic_update_slice(y, product(x, here), (0, part * size)))
        return tuple(new)

    start = tuple(jnp.zeros((len(x), weight.shape[0]), x.dtype) for weight in weights)
    found = jax.lax.fori_loop(0, listing.count, body, start)
    return tuple(
        y + params["bias"] if "bias" in params else y for y, params in zip(found, many, strict=True)
    )


def listed_inputs(
    params: Params, x: Float[Array, "R I"], listing: Listing, backend: Backend
) -> Float[Array, "R O"]:
    """`jaxinfer.nn.linear.linear` with the listed parts of the inputs, of a weight that is
    `InputMajor` for a CPU; the bias is added once. Sums are float32."""
    if backend.has_kernels:
        return skinny_matmul(
            x, [params["weight"]], [params.get("bias")], live=[listing.used], parts="inputs",
            implementation=backend.implementation,
        )[0]  # fmt: skip
    weight = params["weight"].weight
    size = len(weight) // len(listing.parts)

    def body(index: Array, y: Array) -> Array:
        first = listing.parts[index] * size
        here = jax.lax.dynamic_slice_in_dim(weight, first, size)
        some = jax.lax.dynamic_slice_in_dim(x, first, size, axis=1)
        return y + jnp.matmul(some, here, preferred_element_type=jnp.float32)

    start = jnp.zeros((len(x), weight.shape[1]), jnp.float32)
    y = jax.lax.fori_loop(0, listing.count, body, start).astype(x.dtype)
    return y + params["bias"] if "bias" in params else y
