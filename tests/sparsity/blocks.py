"""Small blocks with random routers."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.models.params import abstract_params
from jaxinfer.sparsity.base import Router, Rule
from jaxinfer.sparsity.mlp import SparseMlp

SIZE, RANK = 4, 6  # neurons of a block, rank of a router


def dense_block(cfg):
    """Random weights, and biases that are not zero."""
    block = abstract_params(cfg)["layers"][0]["mlp"]
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), block)


def router(cfg, rule: Rule, seed: int = 0, **options) -> Router:
    rng, blocks = np.random.default_rng(seed), cfg.intermediate_size // SIZE
    inner, outer = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((RANK, cfg.hidden_size), (blocks, RANK))
    )
    return Router(inner=inner, outer=outer, rule=rule, **options)


def sparse(cfg, dense, density: float, lookahead: float | None = 0.0, **options) -> SparseMlp:
    most = max(round(density * cfg.intermediate_size / SIZE), 1)
    return SparseMlp.of(dense, router(cfg, Rule(most=most), lookahead=lookahead), **options)


def with_sparse_blocks(
    cfg, params, density: float = 0.5, lookahead: float | None = 0.0, first: int = 0, **options
):
    """The parameters with the blocks of the layers from `first` on sparse."""
    layers = tuple(
        layer | {"mlp": sparse(cfg, layer["mlp"], density, lookahead, **options)}
        if index >= first else layer
        for index, layer in enumerate(params["layers"])
    )  # fmt: skip
    return params | {"layers": layers}
