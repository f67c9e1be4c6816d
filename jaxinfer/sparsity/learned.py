"""What a method of sparsity learned for one layer, and making the layer sparse with it.

DejaVu (arXiv 2310.17157) leaves the weights alone and adds routers; LTE (2402.06126) also groups
the neurons into blocks, and trains the blocks, or low-rank adapters of them.

Axis letters: J blocks of neurons, K groups of heads that share keys and values, F neurons, D width,
R rank of the adapters.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxinfer.config import ModelConfig
from jaxinfer.nn.mlp import FeedForward
from jaxinfer.nn.quantized import StoredWeight
from jaxinfer.sparsity.base import Router
from jaxinfer.sparsity.heads import SparseHeads, with_heads
from jaxinfer.sparsity.mlp import SparseMlp
from jaxinfer.typing import Leaf, Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, eq=False)
class LayerSparsity:
    """What was learned for one layer; a pytree. Each part is optional, but one router is there.

    Neuron i of the stored order is neuron `permutation[i]` of the model; routers, adapters and new
    weights are of the stored order. Rows of adapters are of one rank, so that a file has one scale
    for each and not for each neuron.
    """

    router: Router | None = None  # of J blocks
    heads: Router | None = None  # of K groups; its look-ahead counts from the attention's input
    permutation: Leaf = None  # i32[F]
    mlp: Leaf = None  # new weights, as a dense block keeps them
    adapters: Leaf = None  # {"up", "gate"?, "down": {"left": [R, outputs], "right": [R, inputs]}}
    unions: tuple[float, ...] = field(default=(), metadata={"static": True})  # see `SparseMlp`
    # of the router of neurons, held out: `jaxinfer.sparsity.recall.in_parts`
    recalls: tuple[float, ...] = field(default=(), metadata={"static": True})

    def applied(self, cfg: ModelConfig, layer: Params, *, keys: str = "always") -> Params:
        """A layer of a model with its block, or its attention, made sparse."""
        if self.router is not None:
            if isinstance(layer["mlp"], FeedForward):
                raise ValueError("its block is sparse already; give the dense model")
            layer = layer | {"mlp": self._block(self.router, layer["mlp"])}
        if self.heads is not None:
            if "attn" not in layer:
                raise ValueError("its router of heads needs attention, which the layer lacks")
            if "heads" in layer["attn"]:
                raise ValueError("its heads are selected already; give the dense model")
            heads = SparseHeads.of(cfg, jax.tree.map(jnp.asarray, self.heads), keys=keys)
            layer = layer | {"attn": with_heads(layer["attn"], heads)}
        return layer

    def _block(self, router: Router, dense: Params) -> SparseMlp:
        weight = dense["up"]["weight"]
        changed = any(x is not None for x in (self.permutation, self.mlp, self.adapters))
        if changed and isinstance(weight, StoredWeight):
            raise ValueError(
                "its block is stored in fewer bits, and the order or the numbers of its neurons "
                "would change; load the model without `weights`, and quantize it after"
            )
        if self.mlp is not None:
            if jax.tree.structure(self.mlp) != jax.tree.structure(dense):
                raise ValueError(
                    "its new weights have biases where the model has none, or lack them"
                )
            dense = jax.tree.map(lambda x: jnp.asarray(x, weight.dtype), self.mlp)
        if self.permutation is not None:
            dense = permuted(dense, jnp.asarray(self.permutation))
        if self.adapters is not None:
            dense = _adapted(dense, self.adapters)
        return SparseMlp.of(dense, jax.tree.map(jnp.asarray, router), unions=self.unions)


def permuted(dense: Params, permutation: Int[Array, " F"]) -> Params:
    """A dense block with neuron `permutation[i]` in place i; it computes the same, up to the order
    in which it sums."""
    down = dense["down"]
    return {
        name: {key: leaf[permutation] for key, leaf in part.items()}
        for name, part in dense.items()
        if name != "down"
    } | {"down": down | {"weight": down["weight"][:, permutation]}}


def _adapted(dense: Params, adapters: Params) -> Params:
    """Every weight with `left.T @ right` added, in float32."""

    def one(part: Params, pair: Params) -> Params:
        weight = part["weight"]
        added = jnp.asarray(pair["left"]).T @ jnp.asarray(pair["right"])
        return part | {"weight": (weight.astype(jnp.float32) + added).astype(weight.dtype)}

    return {name: one(part, adapters[name]) for name, part in dense.items()}
