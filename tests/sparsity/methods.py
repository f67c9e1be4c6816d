"""Methods for tests: random routers, and the same selection computed with every neuron."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.config import ModelConfig
from jaxinfer.nn.activation import activate
from jaxinfer.nn.linear import linear
from jaxinfer.nn.mlp import FeedForward
from jaxinfer.sparsity.base import Router, Rule, Selector
from jaxinfer.sparsity.method import Sparsity
from jaxinfer.sparsity.mlp import SparseMlp
from jaxinfer.typing import Params

SIZE = 4  # neurons of a block


def router(cfg: ModelConfig, layer: int, density: float) -> Router:
    rng, blocks = np.random.default_rng(layer), cfg.intermediate_size // SIZE
    weight = jnp.asarray(rng.normal(size=(blocks, cfg.hidden_size)), jnp.float32)
    return Router(outer=weight, rule=Rule(most=max(round(density * blocks), 1)))


@dataclass(frozen=True, kw_only=True)
class RandomBlocks(Sparsity):
    """Blocks of random routers, but in the layers that stay `dense`."""

    name: str = "random_blocks"
    density: float = 0.25
    dense: tuple[int, ...] = ()

    def apply(self, cfg: ModelConfig, params: Params) -> Params:
        layers = [
            layer if index in self.dense else layer | {"mlp": self.block(cfg, index, layer["mlp"])}
            for index, layer in enumerate(params["layers"])
        ]
        return params | {"layers": tuple(layers)}

    def block(self, cfg: ModelConfig, layer: int, dense: Params) -> FeedForward:
        return SparseMlp.of(dense, router(cfg, layer, self.density))

    def describe(self):
        return {"name": self.name, "density": self.density, "dense": list(self.dense)}


@dataclass(frozen=True, kw_only=True)
class MaskedBlocks(RandomBlocks):
    """The same, computed with every neuron: the simulation in front of the real thing."""

    name: str = "masked_blocks"

    def block(self, cfg: ModelConfig, layer: int, dense: Params) -> FeedForward:
        return Masked(dense=dense, selector=router(cfg, layer, self.density))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Masked(FeedForward):
    """A dense block whose hidden numbers are zero where the selector did not choose them."""

    dense: Params
    selector: Selector

    def __call__(self, cfg: ModelConfig, x, sites: Sequence = (), backend=None):
        selected = self.selector(sites or (x,)).reshape(*x.shape[:-1], self.selector.units)
        hidden = linear(self.dense["up"], x)
        if "gate" in self.dense:
            hidden = activate(cfg.activation, linear(self.dense["gate"], x)) * hidden
        else:
            hidden = activate(cfg.activation, hidden)
        return linear(self.dense["down"], jnp.where(jnp.repeat(selected, SIZE, -1), hidden, 0))
