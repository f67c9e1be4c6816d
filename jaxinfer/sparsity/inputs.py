"""Weights that multiply only some of their inputs: sparsity of activations instead of neurons.

Every column of a weight belongs to one input, so a real implementation reads the columns of those
that are kept. This one multiplies all, the others by zero.

Axis letters: I inputs, O outputs.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxinfer.nn.linear import product, rows
from jaxinfer.nn.quantized import StoredWeight
from jaxinfer.runtime.backend import Backend
from jaxinfer.sparsity.masked import largest
from jaxinfer.typing import Leaf


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SparseInputs(StoredWeight):
    """A weight, and which inputs it multiplies: those larger in magnitude than `threshold` (TEAL,
    arXiv 2408.14690, section 4), or the `most` with the largest |x_i| * `norms[i]`, the norm of the
    weight's column (WINA, 2505.19427, section 3)."""

    weight: Leaf  # [O, I], floating or stored in fewer bits
    threshold: Leaf = None  # f32[]
    most: Leaf = None  # i32[]
    norms: Leaf = None  # f32[I]

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape

    def kept(self, x: Float[Array, "*R I"]) -> Bool[Array, "*R I"]:
        """The inputs that are multiplied."""
        scores = jnp.abs(x.astype(jnp.float32))
        if self.most is None:
            return scores > self.threshold
        return largest(scores * self.norms, self.most)

    def product(
        self, x: Float[Array, "... I"], backend: Backend | None = None
    ) -> Float[Array, "... O"]:
        return product(jnp.where(self.kept(x), x, 0), self.weight, jnp.float32, backend)

    def rows(self, indices: Int[Array, "..."]) -> Float[Array, "... I"]:
        return rows(self.weight, indices)
