"""Streaming through whole models: against a model whose caches are Python lists, against a model
with sliding windows, and what a far token can still change."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.cache.context import chain_context
from jaxinfer.cache.presets import full, h2o, per_layer, streaming
from jaxinfer.models import stack
from jaxinfer.models.params import init_params
from jaxinfer.testing.quick import quick_jit
from tests.cache.layer import rotated
from tests.factories import CONFIGS, random_tokens


@functools.cache
def model_of(layers: int, sink_logits: bool = False):
    """A model louder than at the start of training, so that attention matters."""
    cfg = replace(CONFIGS["llama"], num_layers=layers, sink_logits=sink_logits)
    params = init_params(cfg, jax.random.key(5))
    params = jax.tree.map(lambda x: 2 * x if x.ndim == 2 else x, params)
    for index, layer in enumerate(params["layers"]):
        if sink_logits:
            layer["attn"]["sink"] = jnp.linspace(-2.0, 4.0 + index, cfg.num_heads)
    return cfg, params


@quick_jit
def advance(cfg, params, cache, tokens):
    count = jnp.full((tokens.shape[0],), tokens.shape[1], jnp.int32)
    ctx = chain_context(cache.length, count, tokens.shape[1])
    out = stack.forward(cfg, params, tokens, cache, ctx)
    return stack.commit(cfg, params, cache, out.fresh, None, count, out.hidden), out.logits


def logits_of(model, policy, tokens, size: int = 1) -> np.ndarray:
    """Logits [B, T, V] of `tokens`, read `size` at a time."""
    cfg, params = model
    cache = stack.init_cache(cfg, params, policy, len(tokens), 64)
    found = []
    for first in range(0, tokens.shape[1], size):
        cache, logits = advance(cfg, params, cache, tokens[:, first : first + size])
        found.append(np.asarray(logits))
    return np.concatenate(found, axis=1)


def with_lists(model, tokens, sinks: int, window: int) -> np.ndarray:
    """Logits [T, V] of the paper's algorithm in float64: every layer holds raw keys and values in
    lists, rotates them at their places in these, and cuts the lists after each token."""
    cfg, params = model
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    group = cfg.num_heads // cfg.num_kv_heads

    def linear(layer, x):
        return x @ layer["weight"].T

    def normed(scale, x):
        return x / np.sqrt((x * x).mean() + cfg.norm_eps) * scale["scale"]

    def mixed(layer, kept, x):
        q, k, v = (linear(layer[name], x).reshape(-1, cfg.head_dim) for name in "qkv")
        kept.append((k, v))
        n, out = len(kept), []
        keys = [rotated(key, place, cfg.rope) for place, (key, _) in enumerate(kept)]
        q = rotated(q, n - 1, cfg.rope)
        for head in range(cfg.num_heads):
            s = np.array([key[head // group] for key in keys]) @ q[head] * cfg.head_dim**-0.5
            p = np.exp(s - s.max())
            rest = np.exp(layer["sink"][head] - s.max()) if "sink" in layer else 0.0
            out.append(p @ [value[head // group] for _, value in kept] / (p.sum() + rest))
        if n > sinks + window:
            del kept[sinks]
        return linear(layer["out"], np.concatenate(out))

    def fed(layer, x):
        gate = linear(layer["gate"], x)
        return linear(layer["down"], gate / (1 + np.exp(-gate)) * linear(layer["up"], x))

    caches, logits = [[] for _ in range(cfg.num_layers)], []
    for token in tokens:
        x = params["embed"]["tokens"][token]
        for layer, kept in zip(params["layers"], caches, strict=True):
            x = x + mixed(layer["attn"], kept, normed(layer["attn_norm"], x))
            x = x + fed(layer["mlp"], normed(layer["mlp_norm"], x))
        logits.append(linear(params["head"], normed(params["final_norm"], x)))
    return np.asarray(logits)


def assert_close(found, expected) -> None:
    """Float32 through three layers and reductions in another order: 1e-5 of the logit scale, and a
    factor for the layers' gain."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5 * np.abs(expected).max())


def random_shape(seed: int) -> tuple[int, int, int]:
    """Sinks in 0..8, a window in 1..64, and a number of tokens up to ten times what is seen."""
    rng = np.random.default_rng(seed)
    sinks, window = int(rng.integers(0, 9)), int(2 ** rng.uniform(0, 6))
    return sinks, window, int(rng.integers(2, 11)) * (sinks + window + 1)


SHAPES = [
    (0, 5, 40),
    (3, 12, 130),
    *(pytest.param(*random_shape(seed), marks=pytest.mark.slow) for seed in range(24)),
]


@pytest.mark.parametrize("sinks, window, tokens", SHAPES)
def test_every_layer_equals_a_list_that_is_cut(sinks, window, tokens):
    model, row = model_of(3), random_tokens(1, tokens, seed=window)
    expected = with_lists(model, row[0], sinks, window)
    assert_close(logits_of(model, streaming(sinks, window), row)[0], expected)


def test_a_deep_prefill_of_many_windows_equals_the_list_too():
    model, row = model_of(3), random_tokens(1, 100)
    expected = with_lists(model, row[0], 2, 8)
    assert_close(logits_of(model, streaming(2, 8), row, size=100)[0], expected)


def test_sink_logits_join_the_softmax_of_a_stream():
    model, row = model_of(2, sink_logits=True), random_tokens(1, 40)
    expected = with_lists(model, row[0], 1, 6)
    assert_close(logits_of(model, streaming(1, 6), row, size=10)[0], expected)
    plain = with_lists(model_of(2), row[0], 1, 6)
    assert np.abs(plain - expected).max() > 1e-2 * np.abs(expected).max()


def test_without_sinks_it_is_a_model_with_sliding_windows():
    (cfg, params), row, window = model_of(2), random_tokens(1, 40), 6
    sliding = replace(cfg, sliding_windows=(window + 1,) * 2), params
    expected = logits_of(sliding, full(), row, size=10)
    assert_close(logits_of((cfg, params), streaming(0, window), row, size=10), expected)


@pytest.mark.parametrize("layers", [1, 2])
def test_an_answer_counts_until_it_leaves_the_window_and_no_longer(layers):
    """StreamEval's cliff (section 4.5): with one layer at once, with L layers after L windows,
    since deep keys still carry what left."""
    model, sinks, window, answer = model_of(layers), 2, 7, 5
    rows = np.repeat(random_tokens(1, 40), 2, axis=0)
    rows[1, answer] = (rows[1, answer] + 1) % 61
    found = logits_of(model, streaming(sinks, window), rows)
    differs = (found[0] != found[1]).any(axis=-1)
    expected = np.zeros(40, bool)
    expected[answer : answer + layers * window + 1] = True
    np.testing.assert_array_equal(differs, expected)


def test_an_answer_among_the_sinks_never_leaves():
    rows = np.repeat(random_tokens(1, 40), 2, axis=0)
    rows[1, 1] = (rows[1, 1] + 1) % 61
    found = logits_of(model_of(1), streaming(2, 7), rows)
    assert (found[0] != found[1]).any(axis=-1)[1:].all()


def test_thousands_of_steps_are_one_program():
    (cfg, params), traces = model_of(2), []

    def step(cache, token):
        traces.append(1)
        ones = jnp.ones((1,), jnp.int32)
        out = stack.forward(cfg, params, token, cache, chain_context(cache.length, ones, 1))
        cache = stack.commit(cfg, params, cache, out.fresh, None, ones, out.hidden)
        return cache, jnp.argmax(out.logits[:, -1:], axis=-1).astype(jnp.int32)

    step = quick_jit(step, static_argnums=(), donate_argnums=0)
    cache = stack.init_cache(cfg, params, streaming(4, 60), 1, 64)
    token = jnp.zeros((1, 1), jnp.int32)
    for _ in range(3000):
        cache, token = step(cache, token)
    assert len(traces) == 1 and int(cache.length[0]) == 3000


def test_layers_of_streaming_policies_are_endless_together():
    one, other = streaming(4, 60), streaming(0, 252)
    both = per_layer([one, other])
    assert both.endless and both.positions == "in_cache" and both.fixed_size
    assert (one.reach, other.reach, both.reach) == (65, 253, 253)
    for policy in (full(), h2o(4, 4), streaming(4, 60, positions="absolute")):
        assert not policy.endless and policy.reach is None
        assert not per_layer([one, policy]).endless and per_layer([one, policy]).reach is None


def test_only_a_reach_beyond_the_trained_positions_is_warned_of():
    streaming(4, 59).warn_beyond(64)
    full().warn_beyond(64)
    with pytest.warns(UserWarning, match="spans 65 positions .* exceed the 64 positions"):
        per_layer([streaming(4, 60), streaming(0, 8)]).warn_beyond(64)
