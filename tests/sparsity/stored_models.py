"""Tiny models with sparse blocks of every form that a folder holds."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxinfer.config import ModelConfig
from jaxinfer.nn.block_mlp import BlockWeights
from jaxinfer.sparsity.base import Router, Rule, Selector, Static
from jaxinfer.sparsity.heads import SparseHeads, with_heads
from jaxinfer.sparsity.mlp import SparseMlp
from jaxinfer.typing import Params
from tests.factories import CONFIGS, params_of

BIASED = replace(CONFIGS["learned"], mlp_bias=True)
UNITS = 12


def routers(width: int) -> dict[str, Selector]:
    """Selectors by name; their numbers are float32 whatever the model's are."""
    rng = np.random.default_rng(1)

    def floats(*shape: int):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    low_rank = Router(inner=floats(5, width), outer=floats(UNITS, 5), rule=Rule(most=3))
    linear = Router(
        outer=floats(UNITS, width), bias=floats(UNITS), rule=Rule(most=9, threshold=0.25),
        lookahead=0.5,
    )  # fmt: skip
    return {
        "low rank": low_rank,
        "linear": linear,
        "of the embedding": replace(low_rank, lookahead=None),
        "static": Static(selected=jnp.arange(UNITS) % 3 == 0),
    }


def with_sparse_heads(
    cfg: ModelConfig, params: Params, selector: Selector, **options: Any
) -> Params:
    """The model whose first layer selects among its groups of heads."""
    first, *others = params["layers"]
    heads = SparseHeads.of(cfg, selector, **options)
    return params | {"layers": (first | {"attn": with_heads(first["attn"], heads)}, *others)}


def in_8_bits(block: SparseMlp, *, hidden: bool) -> SparseMlp:
    """With codes, which are no rounding of anything."""
    rng, w = np.random.default_rng(2), block.weights
    neurons, width = w.up.shape

    def codes():
        return jnp.asarray(rng.integers(-127, 128, size=w.up.shape), jnp.int8)

    def scale(size: int):
        return jnp.asarray(rng.uniform(0.001, 0.01, size=size), jnp.float32)

    coded: dict[str, object] = {"up": codes(), "down": codes(), "up_scale": scale(neurons)}
    if w.gate is not None:
        coded |= {"gate": codes(), "gate_scale": scale(neurons)}
    coded |= {"hidden_scale": scale(neurons)} if hidden else {"down_scale": scale(width)}
    return replace(block, weights=replace(w, **coded))


def sparse_model(
    name: str, selector: str, *, codes: str | None = None, dtype: str = "float32"
) -> tuple[ModelConfig, Params]:
    """A model whose second layer is sparse; "biased" has biases in its blocks."""
    cfg = BIASED if name == "biased" else CONFIGS[name]
    params = params_of("learned" if name == "biased" else name, dtype)
    first, layer = params["layers"]
    if name == "biased":
        first, layer = (with_biases(one) for one in (first, layer))
    block = SparseMlp.of(layer["mlp"], routers(cfg.hidden_size)[selector], unions=(0.25, 0.5))
    if codes is not None:
        block = in_8_bits(block, hidden=codes == "hidden")
    assert isinstance(block.weights, BlockWeights)
    return cfg, params | {"layers": (first, layer | {"mlp": block})}


def with_biases(layer: Params) -> Params:
    rng = np.random.default_rng(3)
    mlp = {
        name: {
            "weight": part["weight"],
            "bias": jnp.asarray(rng.normal(size=len(part["weight"])), part["weight"].dtype),
        }
        for name, part in layer["mlp"].items()
    }
    return layer | {"mlp": mlp}
