"""Artefacts of tiny models with random numbers, of every form."""

from collections.abc import Sequence

import numpy as np

from jaxinfer.config import ModelConfig
from jaxinfer.io.int8 import as_stored
from jaxinfer.models.fingerprint import fingerprint
from jaxinfer.sparsity.artefact import SparsityArtefact
from jaxinfer.sparsity.base import Router, Rule
from jaxinfer.sparsity.identity import SparsityConfig
from jaxinfer.sparsity.learned import LayerSparsity
from tests.factories import CONFIGS, params_of

SIZE = 4  # neurons of a block
FORMS = ("router", "adapters", "new weights", "heads")


def artefact_of(name: str = "llama", forms: Sequence[str | None] = FORMS, **options):
    """An artefact for the tiny model `name` whose layers have these forms in turn."""
    cfg, rng = CONFIGS[name], np.random.default_rng(0)
    config = SparsityConfig.of(
        cfg, fingerprint(params_of(name)), model=name, block_size=SIZE,
        **({"method": "lte", "recipe": {"steps": 3}} | options),
    )  # fmt: skip
    layers = (layer_of(rng, cfg, config, forms[i % len(forms)]) for i in range(cfg.num_layers))
    return SparsityArtefact(config, as_stored(tuple(layers)))


def layer_of(
    rng: np.random.Generator, cfg: ModelConfig, config: SparsityConfig, form: str | None
) -> LayerSparsity | None:
    def floats(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    d, f = cfg.hidden_size, cfg.intermediate_size
    lookahead = config.lookahead
    router = Router(
        inner=floats(6, d), outer=floats(f // SIZE, 6), rule=Rule(most=3), lookahead=lookahead
    )
    linear = Router(
        outer=floats(f // SIZE, d), bias=floats(f // SIZE), rule=Rule(threshold=0.0),
        lookahead=lookahead,
    )  # fmt: skip
    if form is None:
        return None
    if form == "router":
        return LayerSparsity(router=router, unions=(0.25, 0.5))
    if form == "heads":
        heads = Router(outer=floats(cfg.num_kv_heads, d), rule=Rule(most=1), lookahead=0.5)
        return LayerSparsity(heads=heads)
    if form == "new weights":
        mlp = {
            part: {"weight": floats(*shape)} | ({"bias": floats(shape[0])} if cfg.mlp_bias else {})
            for part, shape in config.matrices().items()
        }
        return LayerSparsity(router=linear, mlp=mlp)
    adapters = {
        part: {"left": 0.1 * floats(2, outputs), "right": floats(2, inputs)}
        for part, (outputs, inputs) in config.matrices().items()
    }
    order = rng.permutation(f).astype(np.int32)
    return LayerSparsity(router=linear, permutation=order, adapters=adapters)
