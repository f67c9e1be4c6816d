"""`RandomRouters`: the time of contextual sparsity without its quality."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxinfer.config import ModelConfig
from jaxinfer.sparsity.base import Router, Rule
from jaxinfer.sparsity.baselines import units_at
from jaxinfer.sparsity.method import Sparsity
from jaxinfer.sparsity.mlp import SparseMlp
from jaxinfer.typing import Params


@dataclass(frozen=True, kw_only=True)
class RandomRouters(Sparsity):
    """Linear routers with random weights, which cost what trained ones cost and choose the share
    `density` of every block's blocks."""

    name: str = "random-routers"
    density: float
    block_size: int

    def apply(self, cfg: ModelConfig, params: Params) -> Params:
        layers = []
        for index, layer in enumerate(params["layers"]):
            neurons, width = layer["mlp"]["up"]["weight"].shape
            rule = Rule(most=units_at(neurons, self.density, self.block_size))
            shape = neurons // self.block_size, width
            outer = jax.random.normal(jax.random.key(index), shape, jnp.float32)
            layers.append(
                layer | {"mlp": SparseMlp.of(layer["mlp"], Router(outer=outer, rule=rule))}
            )
        return params | {"layers": tuple(layers)}
