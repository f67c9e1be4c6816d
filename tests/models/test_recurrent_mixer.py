"""A recurrent mixer beside attention: nothing outside a mixer knows what it keeps."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfer as ji
from jaxinfer.cache.base import bytes_of
from jaxinfer.config import ModelConfig
from jaxinfer.lm import LM
from jaxinfer.models import mixers
from jaxinfer.models.fingerprint import fingerprint
from jaxinfer.models.params import init_params
from jaxinfer.models.stack import (
    cache_bytes_per_row,
    cache_geometry,
    commit,
    forward,
    grow_cache,
    init_cache,
)
from jaxinfer.speculative.step import tree_context
from jaxinfer.speculative.topology import Topology
from jaxinfer.testing.quick import quick_jit
from tests.factories import BASE, random_tokens
from tests.models.recurrent_mixer import RunningMean

HYBRID = replace(
    BASE,
    num_layers=3,
    mixers=("mean", "attn", "mean"),
    mlps=("plain", "gated", "gated"),
    sliding_windows=(None, 5, None),
)
TREE = Topology.from_children([[[[]], []], [[]], []])  # 8 nodes, 4 levels


@pytest.fixture(scope="module", autouse=True)
def registered():
    mixers.register_mixer("mean", RunningMean())
    yield
    del mixers._MIXERS["mean"]


@pytest.fixture(scope="module")
def hybrid(registered) -> LM:
    params = init_params(HYBRID, jax.random.key(0))
    params = jax.tree.map(lambda x: 2 * x if x.ndim == 2 else x, params)
    return LM(HYBRID, params, name="hybrid")


@quick_jit
def read(cfg, params, cache, tokens, ctx=None):
    return forward(cfg, params, tokens, cache, ctx)


@quick_jit
def push(cfg, params, cache, fresh, accepted, count):
    return commit(cfg, params, cache, fresh, accepted, count)


def one_by_one(lm: LM, cache, tokens):
    """The cache after tokens i32[B, T], and the logits behind each."""
    found = []
    for token in tokens.T:
        out = read(lm.config, lm.params, cache, token[:, None])
        one = jnp.ones(len(token), jnp.int32)
        cache = push(lm.config, lm.params, cache, out.fresh, None, one)
        found.append(out.logits[:, 0])
    return cache, np.stack(found, axis=1)


def test_layers_have_the_parameters_that_their_mixers_and_blocks_name(hybrid):
    layers = hybrid.params["layers"]
    assert [sorted(layer) for layer in layers] == [
        ["attn_norm", "mean", "mlp", "mlp_norm"],
        ["attn", "attn_norm", "mlp", "mlp_norm"],
        ["attn_norm", "mean", "mlp", "mlp_norm"],
    ]
    assert ["gate" in layer["mlp"] for layer in layers] == [False, True, True]
    assert len(fingerprint(hybrid.params)) == 16


def test_a_config_of_layers_survives_json_and_an_old_one_has_none():
    data = HYBRID.to_dict()
    assert ModelConfig.from_dict({**data, "mixers": list(data["mixers"])}) == HYBRID
    old = {name: x for name, x in BASE.to_dict().items() if name not in ("mixers", "mlps")}
    assert ModelConfig.from_dict(old) == BASE and BASE.mixer(0) == "attn"
    with pytest.raises(ValueError, match="mixers has 2 entries for 3 layers"):
        replace(HYBRID, mixers=("mean", "attn"))
    with pytest.raises(ValueError, match="unknown mixer 'rwkv'; known are"):
        init_params(replace(BASE, mixers=("attn", "rwkv")), jax.random.key(0))


def test_a_hybrid_forward_equals_step_by_step(hybrid):
    tokens = random_tokens(2, 12)
    cache = init_cache(HYBRID, hybrid.params, ji.full(), 2, 16)
    _, found = one_by_one(hybrid, cache, tokens)
    np.testing.assert_allclose(found, hybrid.logits(tokens), atol=2e-4)


def test_bytes_and_growth_are_the_mixers_own(hybrid):
    geometry = cache_geometry(HYBRID, 16)
    cache = init_cache(HYBRID, hybrid.params, ji.full(), 2, 16)
    expected = 2 * HYBRID.hidden_size * 4 + 2 * 16 * HYBRID.num_kv_heads * HYBRID.head_dim * 4
    assert cache_bytes_per_row(HYBRID, ji.full(), geometry) == expected
    assert bytes_of(cache.layers) == 2 * expected
    grown = grow_cache(HYBRID, cache, 64)
    assert grown.layers[0].shape == cache.layers[0].shape
    assert grown.layers[1][0].capacity == 64


def test_every_path_of_a_tree_equals_a_chain_and_so_does_its_commit(hybrid):
    cache = init_cache(HYBRID, hybrid.params, ji.full(), 1, 32)
    cache, _ = one_by_one(hybrid, cache, random_tokens(1, 7))
    nodes = random_tokens(1, TREE.nodes, seed=1)
    out = read(HYBRID, hybrid.params, cache, nodes, tree_context(TREE, cache.length))
    for node in range(TREE.nodes):
        path = np.flatnonzero(TREE.ancestors[node])
        after, linear = one_by_one(hybrid, cache, nodes[:, path])
        np.testing.assert_allclose(out.logits[:, path], linear, atol=2e-4)
        accepted = jnp.asarray([[*path, *[0] * (TREE.levels - len(path))]], jnp.int32)
        count = jnp.asarray([len(path)], jnp.int32)
        found = push(HYBRID, hybrid.params, cache, out.fresh, accepted, count)
        following = random_tokens(1, 1, seed=2)
        np.testing.assert_allclose(
            read(HYBRID, hybrid.params, found, following).logits,
            read(HYBRID, hybrid.params, after, following).logits,
            atol=2e-4,
        )


def test_a_row_that_commits_nothing_keeps_its_state(hybrid):
    cache = init_cache(HYBRID, hybrid.params, ji.full(), 2, 32)
    before, _ = one_by_one(hybrid, cache, random_tokens(2, 3))
    out = read(HYBRID, hybrid.params, before, random_tokens(2, 4))
    after = push(HYBRID, hybrid.params, before, out.fresh, None, jnp.asarray([0, 4], jnp.int32))
    np.testing.assert_array_equal(after.layers[0][0], before.layers[0][0])
    assert np.abs(after.layers[0][1] - before.layers[0][1]).max() > 0


def test_a_recurrent_model_drafts_level_by_level(hybrid):
    """The target itself as a draft: every guess is right only if each node stepped on from the
    state of its own parent."""
    prompt = [1, 2, 3, 4, 5]
    plain = hybrid.generate([prompt], max_new_tokens=25)[0]
    draft = LM(HYBRID, hybrid.params, name="itself")
    ahead = ji.speculate(target=hybrid, draft=draft, topology=TREE)
    found = ahead.generate([prompt], max_new_tokens=25)[0]
    assert found.tokens == plain.tokens
    assert found.stats.tokens_per_step == TREE.levels
