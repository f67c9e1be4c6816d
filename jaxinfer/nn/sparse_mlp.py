"""A feed-forward block in which each token uses only the blocks of neurons that a router selects.

It stands in the parameter tree where a dense block does, so every decoder and every cache policy
serves it. Up to `LISTED` tokens of a step read just the weights that any of them selected, by the
kernel `sparse_mlp` on a CUDA device; more (a prompt) read all of them. Either way a token's result
is that of its own selection, whoever shares the step (arXiv 2310.17157, section 4; with neurons
grouped into experts, 2402.06126, section 4).

Axis letters: F neurons, J blocks of them, P rank of the router.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxinfer.config import ModelConfig
from jaxinfer.nn.activation import activate
from jaxinfer.nn.linear import product
from jaxinfer.nn.quantized import StoredWeight
from jaxinfer.runtime.backend import Backend
from jaxinfer.typing import Leaf, Params
from pallas_kernels.dispatch import Implementation
from pallas_kernels.sparse_mlp import sparse_mlp

LISTED = 64  # tokens


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SparseMlp:
    """Weights are neuron-major. `kept` blocks of `block_size` neurons are used by each token, those
    with the largest scores `outer (inner x)`: a linear classifier of low rank, as in DejaVu."""

    up: Leaf  # [F, D]
    down: Leaf  # [F, D], transposed
    inner: Leaf  # [P, D]
    outer: Leaf  # [J, P]
    gate: Leaf = None  # [F, D] or None
    up_bias: Leaf = None  # [F] or None
    gate_bias: Leaf = None
    down_bias: Leaf = None  # [D] or None
    block_size: int = field(metadata={"static": True})
    kept: int = field(metadata={"static": True})

    @classmethod
    def of(
        cls, dense: Params, router: tuple[Array, Array], *, block_size: int, density: float
    ) -> "SparseMlp":  # fmt: skip
        """The parameters of a dense block with a router [P, D], [J, P]; `density` is the share of
        the blocks that a token uses, at least one.

        Raises:
          ValueError: if a router or a density does not fit, or the block is stored in few bits.
        """
        inner, outer = router
        if isinstance(dense["up"]["weight"], StoredWeight):
            raise ValueError(
                "a sparse block reads floating weights, got a block that is stored in fewer bits; "
                "load the model without `weights`, make its blocks sparse, then quantize the "
                "rest with `quantize_weights`, which leaves them as they are"
            )
        neurons, width = dense["up"]["weight"].shape
        blocks = -(-neurons // block_size)
        if inner.shape[1] != width or outer.shape != (blocks, inner.shape[0]):
            raise ValueError(
                f"a router for {neurons} neurons in blocks of {block_size} over width {width} has "
                f"shapes [P, {width}] and [{blocks}, P], got {inner.shape} and {outer.shape}"
            )
        if not 0 < density <= 1:
            raise ValueError(f"density must be above 0 and at most 1, got {density}")
        gate = dense.get("gate", {})
        return cls(
            up=dense["up"]["weight"],
            down=dense["down"]["weight"].T,
            gate=gate.get("weight"),
            up_bias=dense["up"].get("bias"),
            gate_bias=gate.get("bias"),
            down_bias=dense["down"].get("bias"),
            inner=inner,
            outer=outer,
            block_size=block_size,
            kept=max(round(density * blocks), 1),
        )

    def __call__(
        self, cfg: ModelConfig, x: Float[Array, "B T D"], backend: Backend | None = None
    ) -> Float[Array, "B T D"]:
        """The block's output; without a `backend` by its kernel on a CUDA device."""
        rows = x.reshape(-1, x.shape[-1])
        best = self._best(rows)
        if len(rows) <= LISTED:
            implementation = None if backend is None else backend.implementation
            y = self._listed(cfg, rows, best, implementation)
        else:
            y = self._masked(cfg, rows, best)
        return y.astype(x.dtype).reshape(x.shape)

    def _best(self, rows: Float[Array, "R D"]) -> Int[Array, "R kept"]:
        """The blocks that each token uses."""
        scores = product(product(rows, self.inner, jnp.float32), self.outer, jnp.float32)
        return jax.lax.top_k(scores, self.kept)[1]

    def _selected(self, best: Int[Array, "R kept"]) -> Bool[Array, "R J"]:
        return jax.nn.one_hot(best, len(self.outer), dtype=bool).any(axis=1)

    def _listed(
        self, cfg: ModelConfig, rows: Array, best: Array, implementation: Implementation | None
    ) -> Array:
        if len(rows) == 1:  # a list already, which saves a GPU four launches
            blocks, count, row_mask = best[0], jnp.int32(self.kept), None
        else:
            # What any row selected comes first, in order; no more than all together can select.
            selected = self._selected(best)
            used = selected.any(axis=0)
            blocks = jnp.argsort(~used, stable=True)[: len(rows) * self.kept]
            count, row_mask = used.sum(dtype=jnp.int32), selected[:, blocks]
        return sparse_mlp(
            rows, self.gate, self.up, self.down, blocks, count, block_size=self.block_size,
            activation=cfg.activation, row_mask=row_mask, up_bias=self.up_bias,
            gate_bias=self.gate_bias, down_bias=self.down_bias, implementation=implementation,
        )  # fmt: skip

    def _masked(self, cfg: ModelConfig, rows: Array, best: Array) -> Array:
        def project(weight: Array, bias: Leaf) -> Array:
            y = product(rows, weight, jnp.float32)
            return y if bias is None else y + bias.astype(jnp.float32)

        hidden = project(self.up, self.up_bias)
        if self.gate is None:
            hidden = activate(cfg.activation, hidden)
        else:
            hidden = activate(cfg.activation, project(self.gate, self.gate_bias)) * hidden
        every = jnp.repeat(self._selected(best), self.block_size, axis=1)[:, : len(self.up)]
        hidden = jnp.where(every, hidden, 0.0).astype(self.down.dtype)
        y = jnp.matmul(hidden, self.down, preferred_element_type=jnp.float32)
        return y if self.down_bias is None else y + self.down_bias.astype(jnp.float32)
