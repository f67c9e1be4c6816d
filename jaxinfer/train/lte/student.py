"""The model in training: what of it is trained, what is not, and the sparse model that both make.

`trained` and `fixed` are trees that a run keeps and passes; `params` puts them together:

    base        the model before training, its neurons in the order of their groups
    model       all of it in training
    blocks      its feed-forward blocks in training
    adapters    what is added to their weights: {"left": [R, outputs], "right": [R, inputs]}
    routers     per layer `outer` [J, D], and `bias` [J] where there is one
    log_eta     the logarithm of eta, where it is steered

Axis letters: J blocks of neurons, D width, R rank of the adapters.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.config import ModelConfig
from jaxinfer.nn.mlp import FeedForward
from jaxinfer.nn.quantized import StoredWeight
from jaxinfer.sparsity.base import Router, Rule
from jaxinfer.sparsity.grouping import input_weights
from jaxinfer.sparsity.learned import permuted
from jaxinfer.sparsity.mlp import SparseMlp
from jaxinfer.sparsity.router import OPEN, SigmoidRouter, as_router
from jaxinfer.train.lte.recipe import LteRecipe
from jaxinfer.typing import Params


@dataclass(frozen=True, eq=False)
class Student:
    """`base` is the model with its neurons in the order of their groups, `orders[i]` that order in
    layer i."""

    config: ModelConfig
    recipe: LteRecipe
    base: Params
    orders: tuple[np.ndarray, ...]

    @classmethod
    def of(
        cls, cfg: ModelConfig, params: Params, recipe: LteRecipe, orders: tuple[np.ndarray, ...]
    ) -> "Student":
        layers = tuple(
            layer | {"mlp": permuted(layer["mlp"], jnp.asarray(order))}
            for layer, order in zip(params["layers"], orders, strict=True)
        )
        return cls(cfg, recipe, params | {"layers": layers}, orders)

    @property
    def units(self) -> int:
        """J."""
        return self.config.intermediate_size // self.recipe.block_size

    @property
    def rule(self) -> Rule:
        """What the routers' scores select."""
        if self.recipe.learns_routers:
            return OPEN
        density = self.recipe.target_density or 1.0
        return Rule(most=max(round(density * self.units), 1))

    def parts(self) -> Params:
        """What of the model is trained, before the first step."""
        if self.recipe.trainable == "all":
            return {"model": self.base}
        blocks = tuple(layer["mlp"] for layer in self.base["layers"])
        if self.recipe.trainable == "mlp":
            return {"blocks": blocks}
        keys = jax.random.split(jax.random.key(self.recipe.seed + 1), len(blocks))
        return {
            "adapters": tuple(
                _adapters(block, self.recipe.rank, key)
                for block, key in zip(blocks, keys, strict=True)
            )
        }

    def fixed(self) -> Params:
        """What of the model is not trained and yet needed."""
        return {} if self.recipe.trainable == "all" else {"base": self.base}

    def routers(self) -> Params:
        """The routers before the first step; none of a dense model."""
        if self.recipe.method == "dense":
            return {}
        keys = jax.random.split(jax.random.key(self.recipe.seed), self.config.num_layers)
        rows = zip(self.base["layers"], keys, strict=True)
        return {"routers": tuple(self._router(layer["mlp"], key) for layer, key in rows)}

    def _router(self, block: Params, key: jax.Array) -> Params:
        weights = input_weights(block).astype(np.float32)
        units, width = self.units, weights.shape[1]
        centres = jnp.asarray(weights.reshape(units, -1, width).mean(axis=1))
        module = SigmoidRouter(units, self.recipe.start)
        return dict(module.init(key, jnp.zeros((1, width)), centres)["params"])

    def model(self, state: Params) -> Params:
        """The dense parameters of a state, `trained` and `fixed` in one tree."""
        if "model" in state:
            return state["model"]
        layers = state["base"]["layers"]
        if "blocks" in state:
            blocks = state["blocks"]
        else:
            pairs = zip(layers, state["adapters"], strict=True)
            blocks = (_adapted(layer["mlp"], adapters) for layer, adapters in pairs)
        pairs = zip(layers, blocks, strict=True)
        return state["base"] | {"layers": tuple(layer | {"mlp": mlp} for layer, mlp in pairs)}

    def router(self, params: Params) -> Router:
        """One layer's router as it serves."""
        return as_router(params, self.rule)

    def sparse_model(self, state: Params) -> Params:
        """The parameters that serve: those of `model`, with its blocks made sparse by the routers;
        no gradient reaches these."""
        params = self.model(state)
        if "routers" not in state:
            return params
        routers = (_frozen(self.router(router)) for router in state["routers"])
        layers = (
            layer | {"mlp": SparseMlp.of(layer["mlp"], router)}
            for layer, router in zip(params["layers"], routers, strict=True)
        )
        return params | {"layers": tuple(layers)}


def check_model(cfg: ModelConfig, params: Params, recipe: LteRecipe) -> None:
    """Refuses a model that cannot be trained so."""
    for index, layer in enumerate(params["layers"]):
        block = layer["mlp"]
        if isinstance(block, FeedForward):
            raise ValueError(f"the block of layer {index} is sparse already; give the dense model")
        if isinstance(block["up"]["weight"], StoredWeight):
            raise ValueError(
                "a model in fewer bits cannot be trained; load it without `weights`, as float32"
            )
    if cfg.intermediate_size % recipe.block_size and recipe.method != "dense":
        raise ValueError(
            f"the model's {cfg.intermediate_size} neurons cannot be cut into blocks of "
            f"{recipe.block_size}; choose a block_size that divides them"
        )


def _frozen(tree: Any) -> Any:
    return jax.tree.map(jax.lax.stop_gradient, tree)


def _adapters(block: Params, rank: int, key: jax.Array) -> Params:
    """Adapters that add nothing yet (LoRA, arXiv 2106.09685, section 4.1)."""
    found = {}
    for name, part in block.items():
        outputs, inputs = part["weight"].shape
        key, own = jax.random.split(key)
        right = jax.random.normal(own, (rank, inputs)) / math.sqrt(inputs)
        found[name] = {"left": jnp.zeros((rank, outputs)), "right": right}
    return found


def _adapted(block: Params, adapters: Params) -> Params:
    def one(part: Params, pair: Params) -> Params:
        return part | {"weight": part["weight"] + pair["left"].T @ pair["right"]}

    return {name: one(part, adapters[name]) for name, part in block.items()}
