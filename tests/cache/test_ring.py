"""StreamingLLM against a cache that is a Python list, against recomputation, and far out."""

import functools
import inspect
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.cache import attend
from jaxinfer.cache.base import bytes_of
from jaxinfer.cache.fresh import make_mask_fn
from jaxinfer.cache.presets import h2o, streaming
from jaxinfer.eval.stream import LONGEST
from jaxinfer.models import stack
from jaxinfer.models.params import init_params
from jaxinfer.nn.alibi import mpt_slopes
from jaxinfer.nn.rope import rotation
from jaxinfer.ops.attention import finish, merge, partial_attention, sink_partial
from jaxinfer.testing.quick import quick_jit
from tests.cache.layer import (
    ROPE,
    SPEC,
    G,
    H,
    K,
    Layer,
    random_qkv,
    rotated,
    softmax_attention,
)
from tests.factories import CONFIGS, random_tokens

SLOPES = mpt_slopes(K * G)


def trimmed_list(q, k, v, sinks, window, rope=ROPE, slopes=None) -> np.ndarray:
    """The paper's cache of one row: raw keys in a list, rotated at their place in it, then cut."""
    kept, out = [], []
    for t in range(q.shape[1]):
        kept.append(t)
        n = len(kept)
        rows = []
        for head in range(K * G):
            keys, values = k[head // G, kept], v[head // G, kept]
            query, bias = q[head, t], 0.0
            if rope is not None:
                keys = np.stack([rotated(key, place, rope) for place, key in enumerate(keys)])
                query = rotated(query, n - 1, rope)
            if slopes is not None:
                bias = -slopes[head] * (n - 1 - np.arange(n))
            rows.append(softmax_attention(query, keys, values, bias))
        out.append(rows)
        if len(kept) > sinks + window:
            kept = kept[:sinks] + kept[-window:]
    return np.asarray(out).swapaxes(0, 1)


@pytest.mark.parametrize(
    "sinks, window, tokens", [(4, 6, 60), (1, 1, 20), (0, 5, 40), (8, 3, 64), (3, 64, 50)]
)
def test_the_ring_equals_a_list_that_is_cut(sinks, window, tokens):
    q, k, v = random_qkv(tokens)
    found = Layer(streaming(sinks, window)).stream(q, k, v)
    expected = trimmed_list(q[0], k[0], v[0], sinks, window)
    np.testing.assert_allclose(found[0], expected, atol=2e-5)


def test_partial_rotary_and_alibi_count_distance_in_the_cache():
    q, k, v = random_qkv(40)
    half = replace(ROPE, rotary_dim=4)
    found = Layer(streaming(2, 5), rope=half).stream(q, k, v)
    np.testing.assert_allclose(found[0], trimmed_list(q[0], k[0], v[0], 2, 5, half), atol=2e-5)
    found = Layer(streaming(2, 5), replace(SPEC, slopes=SLOPES), rope=None).stream(q, k, v)
    expected = trimmed_list(q[0], k[0], v[0], 2, 5, None, SLOPES)
    np.testing.assert_allclose(found[0], expected, atol=2e-5)


@pytest.mark.parametrize("sizes", [(40,), (13, 27), (1, 2, 30, 7)])
def test_a_turn_in_chunks_of_any_size_equals_token_by_token(sizes):
    q, k, v = random_qkv(40, batch=2)
    policy = streaming(sinks=3, window=6)
    expected = Layer(policy, batch=2).stream(q, k, v)
    layer, found, first = Layer(policy, batch=2), [], 0
    for size in sizes:
        found.append(layer.push(*(x[:, :, first : first + size] for x in (q, k, v))))
        first += size
    np.testing.assert_allclose(np.concatenate(found, axis=2), expected, atol=2e-5)


def test_a_long_chunk_in_blocks_of_queries_equals_token_by_token():
    q, k, v = random_qkv(1100)  # two blocks of 512 and a rest
    policy = streaming(sinks=2, window=30)
    found, expected = Layer(policy).push(q, k, v), Layer(policy).stream(q, k, v)
    np.testing.assert_allclose(found, expected, atol=5e-5)


@pytest.mark.parametrize("start", [1000, 100_000, 4_000_000, 100_000_000, LONGEST - 64])
def test_positions_stay_exact_after_millions_of_tokens(start):
    sinks, window, tokens = 3, 30, 40
    q, k, v = random_qkv(sinks + tokens)
    layer = Layer(streaming(sinks, window), compiled="as users do")
    layer.push(*(x[:, :, :sinks] for x in (q, k, v)))
    layer.length += start
    found = layer.stream(*(x[:, :, sinks:] for x in (q, k, v)))
    # From the window's first refill on, the cache holds the sinks and the last tokens only.
    expected = trimmed_list(q[0], k[0], v[0], sinks, window)[:, sinks:]
    np.testing.assert_allclose(found[0][:, window:], expected[:, window:], atol=2e-5)


def test_float_angles_would_not_have_been_enough():
    """The guard of the test above: what `exact` is for."""
    distances = jnp.arange(1000)[None]

    def turned(start, exact):
        """Cosine of each token's angle to the first one's."""
        cos, sin = rotation(ROPE, start + distances, exact=exact)
        return cos * cos[:, :1] + sin * sin[:, :1]

    expected = turned(0, True)
    error = {x: float(jnp.abs(turned(4_000_001, x) - expected).max()) for x in (True, False)}
    assert error[True] < 3e-6 and error[False] > 1e-3


def test_a_stream_with_float_angles_is_wrong_after_four_million_tokens(monkeypatch):
    """The guard of the tests above: these would notice."""
    monkeypatch.setattr(
        attend, "rotation", lambda rope, positions, exact=False: rotation(rope, positions)
    )
    sinks, window, tokens = 3, 30, 40
    q, k, v = random_qkv(sinks + tokens)
    layer = Layer(streaming(sinks, window), replace(SPEC, scale=1.01 * SPEC.scale))  # traced anew
    layer.push(*(x[:, :, :sinks] for x in (q, k, v)))
    layer.length += 4_000_000
    found = layer.stream(*(x[:, :, sinks:] for x in (q, k, v)))
    expected = trimmed_list(1.01 * q[0], k[0], v[0], sinks, window)[:, sinks:]
    assert np.abs(found[0] - expected)[:, window:].max() > 1e-3


def test_a_window_does_not_notice_where_its_stream_began():
    q, k, v = random_qkv(20)
    policy, window = streaming(0, 5), 5
    found = [Layer(policy, length=start).stream(q, k, v)[:, :, window:] for start in (0, 12_345)]
    np.testing.assert_allclose(*found, atol=2e-6)


def test_the_order_of_slots_does_not_matter():
    q, k, v = random_qkv(30)
    layer = Layer(streaming(2, 9))
    layer.stream(q, k, v)
    n_in = jnp.asarray([28], jnp.int32)  # what has entered the ring
    (segment,) = layer.policy.tiers[1].segments(layer.state[1], None, n_in)
    order = np.random.default_rng(0).permutation(9)
    slots = replace(segment.slots, k=segment.slots.k[..., order], v=segment.slots.v[:, :, order])
    position = jnp.asarray([[30]], jnp.int32)
    query = jnp.asarray(q[:, :, -1:], jnp.float32).reshape(1, K, G, 1, H)
    spec = replace(SPEC, slopes=SLOPES)  # so that scores depend on positions

    @functools.partial(quick_jit, static_argnums=())
    def attended(slots, pos, ok):
        mask_fn = make_mask_fn(layer.policy, spec, position, position)
        one = replace(segment, slots=slots, pos=pos, ok=ok)
        return finish(one.partial(spec, query, position, mask_fn))

    right = attended(segment.slots, segment.pos, segment.ok)
    moved = attended(slots, segment.pos[..., order], segment.ok[..., order])
    np.testing.assert_allclose(moved, right, atol=1e-6)
    without = attended(slots, segment.pos, segment.ok)  # positions that stay where they were
    assert np.abs(without - right).max() > 1e-3


forward = quick_jit(stack.forward)


def one_layer(name: str, layers: int):
    cfg = replace(CONFIGS[name], num_layers=layers)
    return cfg, init_params(cfg, jax.random.key(3))


@pytest.mark.parametrize("model", ["llama", "mpt"])
@pytest.mark.parametrize("layers, equal", [(1, True), (2, False)])
def test_one_layer_equals_recomputing_the_window_and_two_do_not(model, layers, equal):
    cfg, params = one_layer(model, layers)
    sinks, window = 2, 9
    tokens = random_tokens(1, 40)
    cache = stack.init_cache(cfg, params, streaming(sinks, window), 1, 64)
    logits = forward(cfg, params, jnp.asarray(tokens), cache).logits
    seen = np.concatenate([tokens[:, :sinks], tokens[:, -window - 1 :]], axis=1)
    expected = forward(cfg, params, jnp.asarray(seen)).logits
    difference = np.abs(np.asarray(logits)[0, -1] - np.asarray(expected)[0, -1]).max()
    assert (difference < 1e-4) if equal else (difference > 1e-3)


def test_the_cache_never_grows():
    cfg, params = one_layer("llama", 2)
    policy = streaming(sinks=4, window=12)
    for capacity in (64, 65536):
        cache = stack.init_cache(cfg, params, policy, 1, capacity)
        assert bytes_of(cache.layers) == 2 * 2 * cfg.num_kv_heads * cfg.head_dim * 4 * (4 + 12)
    assert policy.fixed_size and not h2o(0.1, 0.1).sized(64).tiers[0].grows


def random_partial_inputs():
    rng = np.random.default_rng(0)
    shapes = (1, K, G, 3, H), (1, K, 5, H), (1, K, 5, H)
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return q, k, v, np.zeros((1, 1, 3, 5), np.int32), np.ones((1, 1, 1, 5), bool)


@functools.partial(quick_jit, static_argnums=())
def attended(q, k, v, distance, visible, sink=None):
    partial = partial_attention(SPEC, q, k, v, distance, visible)
    return finish(partial if sink is None else merge(sink_partial(q, sink), partial))


@pytest.mark.parametrize("logit", [-3.0, 0.0, 1.7])
def test_a_sink_logit_equals_a_prepended_token_of_that_score_and_value_zero(logit):
    """A logit of 0 is SoftMax-off-by-one: key and value of the token are zero."""
    q, k, v, distance, visible = random_partial_inputs()

    found = attended(q, k, v, distance, visible, np.full((K * G,), logit, np.float32))
    # One more channel, 1 in every query and 0 in every key but the new one's.
    q = np.pad(q, [(0, 0)] * 4 + [(0, 1)], constant_values=1.0)
    k, v = (np.pad(x, [(0, 0), (0, 0), (1, 0), (0, 1)]) for x in (k, v))
    k[:, :, 0, H] = logit / SPEC.scale
    distance, visible = np.zeros((1, 1, 3, 6), np.int32), np.ones((1, 1, 1, 6), bool)
    expected = attended(q, k, v, distance, visible)
    np.testing.assert_allclose(found, expected[..., :H], atol=1e-6)


def test_a_sink_logit_of_minus_infinity_is_the_plain_softmax():
    q, k, v, distance, visible = random_partial_inputs()
    never = np.full((K * G,), -np.inf, np.float32)
    found = attended(q, k, v, distance, visible, never)
    np.testing.assert_array_equal(found, attended(q, k, v, distance, visible))


def test_a_model_with_sink_logits_uses_them():
    cfg = replace(CONFIGS["llama"], sink_logits=True)
    params = init_params(cfg, jax.random.key(0))
    tokens = jnp.asarray(random_tokens(1, 6))
    layer = params["layers"][0]
    assert layer["attn"]["sink"].shape == (cfg.num_heads,)
    off_by_one = forward(cfg, params, tokens).logits
    never = jax.tree.map(lambda x: x, params)
    for one in never["layers"]:
        one["attn"] = one["attn"] | {"sink": jnp.full((cfg.num_heads,), -jnp.inf)}
    plain = {**params, "layers": tuple(
        {**one, "attn": {n: x for n, x in one["attn"].items() if n != "sink"}}
        for one in params["layers"]
    )}  # fmt: skip
    expected = np.asarray(forward(CONFIGS["llama"], plain, tokens).logits)
    np.testing.assert_array_equal(forward(cfg, never, tokens).logits, expected)
    assert np.abs(off_by_one - expected).max() > 1e-3


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: streaming(sinks=-1), "sinks must be 0 or more whole tokens, got -1"),
        (lambda: streaming(window=0), "window must be 1 or more whole tokens"),
        (lambda: streaming(window=0.25), "window must be 1 or more whole tokens, got 0.25"),
        (lambda: streaming(window=0.25, bits=2), "window must be 1 or more whole tokens"),
        (lambda: streaming(window=True), "window must be 1 or more whole tokens, got True"),
        (lambda: streaming(window="a"), "window must be 1 or more whole tokens, got 'a'"),
        (lambda: streaming(sinks=1.5), "sinks must be 0 or more whole tokens, got 1.5"),
        (lambda: streaming(positions="relative"), "positions must be"),
        (lambda: h2o(heavy=1.5), "a share in"),
        (lambda: h2o(recent=0), "recent must be 1 or more whole tokens"),
        (lambda: h2o(heavy=True), "heavy must be 1 or more whole tokens"),
        (lambda: h2o(heavy=0.0), "heavy must be a share in"),
    ],
)
def test_impossible_budgets_are_refused(make, message, monkeypatch):
    # without the tests' own type check, which users do not have
    monkeypatch.setitem(make.__globals__, "streaming", inspect.unwrap(streaming))
    with pytest.raises(ValueError, match=message):
        make()


def test_learned_positions_are_refused_with_the_remedy():
    cfg, params = one_layer("learned", 1)
    with pytest.raises(ValueError, match="learned positions.*choose full, kivi or h2o"):
        stack.init_cache(cfg, params, streaming(), 1, 64)
