"""What was learned for a model makes its blocks sparse, and shares all else with the dense one."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.models.fingerprint import fingerprint
from jaxinfer.models.quantize import quantize_weights
from jaxinfer.nn.mlp import feed_forward
from jaxinfer.sparsity.artefact import SparsityArtefact
from jaxinfer.sparsity.base import Rule
from jaxinfer.sparsity.learned import LayerSparsity, permuted
from jaxinfer.sparsity.mlp import SparseMlp
from tests.factories import CONFIGS, params_of
from tests.sparsity.artefacts import SIZE, artefact_of

NAMES = pytest.mark.parametrize("name", ["llama", "learned"])


def outputs(name: str, params):
    """What the feed-forward blocks of all layers give for the same inputs."""
    cfg = CONFIGS[name]
    x = jax.random.normal(jax.random.key(1), (2, 3, cfg.hidden_size))
    layers = enumerate(params["layers"])
    return np.stack([feed_forward(cfg, layer["mlp"], x, index) for index, layer in layers])


def every_block(artefact: SparsityArtefact) -> SparsityArtefact:
    """The artefact with routers that select all blocks."""
    layers = [
        replace(layer, router=replace(layer.router, rule=Rule(threshold=-1e9)))
        for layer in artefact.layers
    ]
    return replace(artefact, layers=tuple(layers))


@NAMES
def test_dense_layers_and_all_weights_that_stay_are_shared(name):
    params, artefact = params_of(name), artefact_of(name, ("router", None))
    sparse = artefact.apply(CONFIGS[name], params)
    assert sparse["embed"] is params["embed"] and sparse["layers"][1] is params["layers"][1]
    layer, dense = sparse["layers"][0], params["layers"][0]
    block = layer["mlp"]
    assert layer["attn"] is dense["attn"] and block.weights.up is dense["mlp"]["up"]["weight"]
    assert isinstance(block, SparseMlp) and block.unions == (0.25, 0.5)
    assert block.block_size == SIZE


@NAMES
def test_a_permutation_changes_nothing_of_the_dense_block(name):
    """lte.md 7.1: the dense output before and after."""
    params, artefact = params_of(name), every_block(artefact_of(name, ("adapters",)))
    bare = [replace(layer, adapters=None) for layer in artefact.layers]
    found = outputs(name, replace(artefact, layers=tuple(bare)).apply(CONFIGS[name], params))
    wanted = outputs(name, params)
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


@NAMES
def test_adapters_are_added_to_the_weights_of_the_stored_order(name):
    params, artefact = params_of(name), every_block(artefact_of(name, ("adapters",)))
    layers = []
    for ours, layer in zip(artefact.layers, params["layers"], strict=True):
        dense = permuted(layer["mlp"], jnp.asarray(ours.permutation))
        for part, pair in ours.adapters.items():
            weight = dense[part]["weight"] + pair["left"].T @ pair["right"]
            dense = dense | {part: dense[part] | {"weight": weight}}
        layers.append(layer | {"mlp": dense})
    wanted = outputs(name, params | {"layers": tuple(layers)})
    found = outputs(name, artefact.apply(CONFIGS[name], params))
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


@NAMES
def test_new_weights_take_the_place_and_the_dtype_of_the_models(name):
    artefact = every_block(artefact_of(name, ("new weights",)))
    params = params_of(name)
    layers = [
        layer | {"mlp": jax.tree.map(jnp.asarray, ours.mlp)}
        for ours, layer in zip(artefact.layers, params["layers"], strict=True)
    ]
    wanted = outputs(name, params | {"layers": tuple(layers)})
    found = outputs(name, artefact.apply(CONFIGS[name], params))
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
    half = artefact.apply(CONFIGS[name], params_of(name, "bfloat16"))["layers"][0]["mlp"]
    assert half.weights.up.dtype == jnp.bfloat16 and half.selector.outer.dtype == jnp.float32


def test_a_router_of_heads_stands_with_the_attention():
    artefact = artefact_of("llama", ("heads", None))
    layer = artefact.apply(CONFIGS["llama"], params_of("llama"))["layers"][0]
    selector = layer["attn"]["heads"].selector
    assert selector.units == 2 and selector.lookahead == 0.5
    assert layer["mlp"] is params_of("llama")["layers"][0]["mlp"]


def test_another_model_is_refused_with_what_differs():
    artefact, params = artefact_of("llama"), params_of("llama")
    cfg = CONFIGS["llama"]
    artefact.check(cfg, fingerprint(params_of("llama", "bfloat16")))
    with pytest.raises(ValueError, match="belongs to 'llama' .*gated True, not False.*train lte"):
        artefact.apply(CONFIGS["mpt"], params)
    with pytest.raises(ValueError, match="hidden_size 32, not 64.*jaxinfer train lte"):
        artefact.check(replace(cfg, hidden_size=64))
    other = params | {"embed": {"tokens": -params["embed"]["tokens"]}}
    with pytest.raises(ValueError, match="other weights"):
        artefact.apply(cfg, other)


def test_blocks_that_cannot_be_made_sparse_are_refused():
    cfg, params = CONFIGS["llama"], params_of("llama")
    artefact = artefact_of("llama", ("adapters",))
    stored = quantize_weights(params, "int8", origin=fingerprint(params))
    with pytest.raises(ValueError, match="layer 0: its block is stored in fewer bits"):
        artefact.apply(cfg, stored)
    with pytest.raises(ValueError, match="layer 0: its block is sparse already"):
        artefact.apply(cfg, artefact.apply(cfg, params))


def changed(form: str, **changes) -> tuple[LayerSparsity, ...]:
    return tuple(replace(layer, **changes) for layer in artefact_of("llama", (form,)).layers)


ROUTER = artefact_of("llama", ("router",)).layers[0].router
ORDER = np.arange(48, dtype=np.int32)
WRONG = {
    "a router of other blocks": (
        "router",
        {"router": replace(ROUTER, outer=np.zeros((5, 6), "f4"))},
        r"layer 0: has router.outer float32\[5, 6\] instead of router.outer float32\[12, 6\]",
    ),
    "a router of halves": (
        "router", {"router": replace(ROUTER, outer=np.zeros((12, 6), "f2"))}, "float16"
    ),
    "more units than there are": (
        "router", {"router": replace(ROUTER, rule=Rule(most=13))}, "selects 13 of 12 units"
    ),
    "another look-ahead than the config's": (
        "router", {"router": replace(ROUTER, lookahead=0.5)}, "look-ahead 0.5, .* says 0.0"
    ),
    "a look-ahead of two layers": (
        "router", {"router": replace(ROUTER, lookahead=2.0)}, "must be 0, 0.5 or 1 layers"
    ),
    "NaN": (
        "router", {"router": replace(ROUTER, inner=np.full((6, 32), np.nan, "f4"))}, "not finite"
    ),
    "a threshold of infinity": (
        "router", {"router": replace(ROUTER, rule=Rule(threshold=1e39))}, "threshold must be"
    ),
    "a neuron twice": ("adapters", {"permutation": ORDER // 2}, "a permutation that is none"),
    "a neuron below": ("adapters", {"permutation": ORDER - 1}, "a permutation that is none"),
    "no router": ("router", {"router": None}, "dense: give None in its place"),
    "weights of a dense block": ("heads", {"permutation": ORDER}, "keeps its weights as they are"),
    "new weights in another order": (
        "new weights", {"permutation": ORDER}, "either them, or a permutation"
    ),
    "shares above one": ("router", {"unions": (0.5, 1.5)}, "shares from 0 to 1"),
    "shares that fall": ("router", {"unions": (0.5, 0.4)}, "that do not fall"),
}  # fmt: skip


@pytest.mark.parametrize("form, changes, message", WRONG.values(), ids=WRONG)
def test_what_makes_no_sense_is_refused_when_it_is_made(form, changes, message):
    config = artefact_of("llama").config
    with pytest.raises(ValueError, match=message):
        SparsityArtefact(config, changed(form, **changes))


def test_a_block_size_divides_the_neurons_and_every_layer_is_told():
    config = artefact_of("llama").config
    with pytest.raises(ValueError, match="blocks of 5 neurons do not divide 48"):
        replace(config, block_size=5)
    with pytest.raises(ValueError, match="1 layers are given for a model of 2"):
        SparsityArtefact(config, (None,))
    with pytest.raises(ValueError, match="lookahead must be 0, 0.5 or 1"):
        replace(config, lookahead=0.25)
