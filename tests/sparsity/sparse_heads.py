"""Tiny models of whose heads each token uses some, chosen by random routers."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from jaxinfer.config import ModelConfig
from jaxinfer.lm import LM
from jaxinfer.runtime.backend import Backend
from jaxinfer.sparsity.base import Router, Rule, Selector
from jaxinfer.sparsity.heads import SparseHeads, with_heads
from jaxinfer.typing import Params
from tests.factories import CONFIGS, params_of

GROUPED = replace(CONFIGS["llama"], num_heads=8, num_kv_heads=4)


def router(cfg: ModelConfig, seed: int, rule: Rule, **options) -> Router:
    outer = np.random.default_rng(seed).normal(size=(cfg.num_kv_heads, cfg.hidden_size))
    return Router(outer=jnp.asarray(outer, jnp.float32), rule=rule, **options)


def with_random_heads(
    cfg: ModelConfig,
    params: Params,
    rule: Rule,
    *,
    keys: str = "always",
    backend: Backend | None = None,
    **options,
) -> Params:
    """All layers with a router of their own."""
    layers = []
    for index, layer in enumerate(params["layers"]):
        heads = SparseHeads.of(cfg, router(cfg, index, rule), keys=keys, **options)
        layers.append(layer | {"attn": with_heads(layer["attn"], heads, backend)})
    return params | {"layers": tuple(layers)}


def sparse_lm(model: str, rule: Rule, **options) -> LM:
    """A model of the tests' factories with random heads."""
    cfg = CONFIGS[model]
    return LM(cfg, with_random_heads(cfg, params_of(model), rule, **options), name=model)


def with_selector(cfg: ModelConfig, params: Params, selector: Selector, **options) -> Params:
    """All layers with one selector."""
    heads = SparseHeads.of(cfg, selector, **options)
    layers = (layer | {"attn": with_heads(layer["attn"], heads)} for layer in params["layers"])
    return params | {"layers": tuple(layers)}
