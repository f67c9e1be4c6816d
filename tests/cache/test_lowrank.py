"""LESS: what the low-rank state holds, and how it joins the softmax."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.cache import lowrank
from jaxinfer.cache.base import Geometry
from jaxinfer.cache.lowrank import LowRank
from jaxinfer.cache.presets import h2o, streaming
from jaxinfer.cache.slots import slot_bytes
from jaxinfer.models import stack
from jaxinfer.models.params import abstract_params
from jaxinfer.nn.feature_map import FeatureMaps
from jaxinfer.ops.attention import NEGATIVE, finish, merge, partial_attention
from jaxinfer.testing.quick import quick_jit
from pallas_kernels.less_state import reference
from tests.cache.layer import SPEC, G, H, K, Layer, random_qkv, rotated, softmax_attention
from tests.cache.test_heavy import Simulation
from tests.factories import CONFIGS

RANK = 3
NOWHERE = jnp.zeros((1, 1), jnp.int32)  # the state forgets positions
BASES = {"h2o": h2o(4, 3), "streaming": streaming(2, 5), "window": streaming(0, 6)}


def features_of(which: str, maps, x):
    """phi of queries or psi of keys."""
    return FeatureMaps.of_params(maps).apply({"params": maps}, x, method=which)


features = quick_jit(features_of)


def over(base):
    """`base` with a low-rank tier, as `ji.less` makes it."""
    return replace(base, name="less", tiers=(*base.tiers, LowRank(rank=RANK)))


@functools.cache
def kernels(scale: float = 0.5, seed: int = 0):
    """Random kernels whose psi is of size `scale`."""
    maps = FeatureMaps(K * G, K, H, 16, RANK)
    q, k = jnp.zeros((1, K * G, 1, H)), jnp.zeros((1, K, 1, H))
    made = quick_jit(FeatureMaps.init)(maps, jax.random.key(seed), q, k)["params"]
    made = made | {name: jnp.full_like(made[name], scale) for name in ("scale", "mix_scale")}
    return {"feature_map": made}


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_kernels_of_zero_equal_the_bare_policy_bitwise(base):
    q, k, v = random_qkv(40, batch=2)
    bare = Layer(base, batch=2, compiled="as users do")
    less = Layer(over(base), aux=kernels(scale=0.0), batch=2, compiled="as users do")
    pieces = [slice(0, 12), *(slice(t, t + 1) for t in range(12, 40))]
    for piece in pieces:
        fresh = tuple(x[:, :, piece] for x in (q, k, v))
        np.testing.assert_array_equal(less.push(*fresh), bare.push(*fresh))


@pytest.mark.parametrize("base", [h2o(16, 16), streaming(2, 32), streaming(0, 32)], ids=BASES)
def test_a_budget_that_evicts_nothing_equals_dense_attention(base):
    q, k, v = random_qkv(20)
    layer = Layer(over(base), aux=kernels(scale=5.0))
    found = layer.stream(q, k, v)
    assert not layer.state[-1].num.any() and not layer.state[-1].den.any()
    qr = np.stack([rotated(q[0][:, t], t) for t in range(20)], axis=1)
    kr = np.stack([rotated(k[0][:, t], t) for t in range(20)], axis=1)
    expected = [
        [softmax_attention(qr[n, t], kr[n // G, : t + 1], v[0][n // G, : t + 1]) for n in range(4)]
        for t in range(20)
    ]
    np.testing.assert_allclose(found[0], np.swapaxes(expected, 0, 1), atol=2e-5)


def test_the_state_is_the_sum_over_exactly_the_evicted_tokens():
    q, k, v = random_qkv(40)
    aux = kernels()
    layer, simulation = Layer(over(h2o(4, 3)), aux=aux), Simulation(q[0], k[0], v[0])
    layer.push(*(x[:, :, :12] for x in (q, k, v)))
    simulation.read(0, 12)
    for t in range(12, 40):
        layer.push(*(x[:, :, t : t + 1] for x in (q, k, v)))
        # LESS changes outputs, not who is evicted: scores leave its denominator out.
        simulation.read(t, 1)
    keys = jnp.asarray(simulation.k, jnp.float32)[None]
    psi = np.asarray(features("key", aux["feature_map"], keys))[0]
    state = layer.state[-1]
    for head in range(K):
        gone = simulation.evicted[head]
        assert len(gone) == len(set(gone)) == 40 - 7 and max(gone) < 37
        den, num = psi[head, gone].sum(axis=0), psi[head, gone].T @ v[0][head, gone]
        np.testing.assert_allclose(state.den[0, head], den, rtol=1e-5)
        np.testing.assert_allclose(state.num[0, head], num, atol=1e-5)


@pytest.mark.parametrize("prompt", [5, 7, 12])
def test_outputs_are_those_of_kept_and_evicted_tokens_together(prompt):
    """Equation 3 in float64, for prompts below, at and above the budget."""
    tokens, aux = 24, kernels()
    q, k, v = random_qkv(tokens)
    layer, simulation = Layer(over(h2o(4, 3)), aux=aux), Simulation(q[0], k[0], v[0])
    layer.push(*(x[:, :, :prompt] for x in (q, k, v)))
    simulation.read(0, prompt)
    rotated_q, rotated_k = (jnp.asarray(x, jnp.float32)[None] for x in (simulation.q, simulation.k))
    phi = np.asarray(features("query", aux["feature_map"], rotated_q), np.float64)[0]
    psi = np.asarray(features("key", aux["feature_map"], rotated_k), np.float64)[0]
    for t in range(prompt, tokens):
        found = layer.push(*(x[:, :, t : t + 1] for x in (q, k, v)))[0, :, 0]
        for n in range(K * G):
            head = n // G
            gone, kept = simulation.evicted[head], [*simulation.score[head], t]
            dense = np.exp(simulation.k[head, kept] @ simulation.q[n, t] * SPEC.scale)
            low = psi[head, gone] @ phi[n, t]
            expected = dense @ v[0, head, kept] + low @ v[0, head, gone]
            expected /= dense.sum() + low.sum()
            np.testing.assert_allclose(found[n], expected, atol=2e-5)
        simulation.read(t, 1)


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_all_weights_of_a_query_sum_to_one(base):
    q, k, v = random_qkv(30)
    out = Layer(over(base), aux=kernels(scale=3.0)).stream(q, k, np.ones_like(v))
    np.testing.assert_allclose(out, 1, rtol=0, atol=2e-6)


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_padding_never_enters_the_state_of_a_row(base):
    q, k, v = random_qkv(14, batch=2)
    layer = Layer(over(base), aux=kernels(), batch=2, compiled="as users do")  # compiled above
    alone = Layer(over(base), aux=kernels())
    padded = [x[:, :, :12].copy() for x in (q, k, v)]
    for x in padded:
        x[1, :, 7:] = np.nan
    layer.push(*padded, count=[12, 7])
    alone.push(*(x[1:, :, :7] for x in (q, k, v)))
    for t in range(7, 14):  # the long row waits
        fresh = [np.stack([x[0, :, :1], x[1, :, t : t + 1]]) for x in (q, k, v)]
        layer.push(*fresh, count=[0, 1])
        alone.push(*(x[1:, :, t : t + 1] for x in (q, k, v)))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[1], b[0], rtol=1e-5, atol=1e-6),
        layer.state, alone.state,
    )  # fmt: skip


def test_features_of_keys_depend_on_where_the_text_starts():
    """Keys are absorbed as attention has them, rotated: the state knows absolute positions, which
    attention itself does not."""
    q, k, _ = random_qkv(12)
    at = [[rotated(x[0], start) for x in (q[:, :K], k)] for start in (0, 7)]
    scores = [np.einsum("kth,kjh->ktj", *turned) for turned in at]
    np.testing.assert_allclose(*scores, atol=1e-9)
    first, second = (
        np.asarray(features("key", kernels()["feature_map"], jnp.asarray(turned[1][None])))
        for turned in at
    )
    assert np.abs(first - second).max() > 1e-2 * np.abs(first).max()


def test_the_state_takes_the_memory_of_eight_tokens():
    geometry = Geometry(num_kv_heads=3, head_dim=64, capacity=64, dtype="bfloat16")
    token = slot_bytes(geometry, 1)
    assert 8 <= LowRank(rank=8).bytes_per_row(geometry) / token < 8.2


def test_chunks_and_single_tokens_absorb_alike():
    q, k, v = random_qkv(30)
    policy = over(streaming(2, 5))
    one = Layer(policy, aux=kernels())
    one.stream(q, k, v)
    many = Layer(policy, aux=kernels())
    for piece in (slice(0, 17), slice(17, 18), slice(18, 30)):
        many.push(*(x[:, :, piece] for x in (q, k, v)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one.state, many.state)


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_an_oracle_map_gives_full_attention(base, monkeypatch):
    """phi(q) psi(k) = exp(logit) for every key: the merge must then lose nothing."""
    tokens = 24
    q, k, v = random_qkv(tokens)
    kr = jnp.asarray(np.stack([rotated(k[0][:, t], t) for t in range(tokens)], axis=1), jnp.float32)

    def psi(x, *maps):  # one-hot in the token
        return jax.nn.one_hot(jnp.argmax(jnp.einsum("bkah,kth->bkat", x, kr) * 2
                              - (kr**2).sum(-1)[None, :, None], axis=-1), tokens)  # fmt: skip

    def phi(x, *maps):
        scores = jnp.einsum("bkgth,kjh->bkgtj", x.reshape(x.shape[0], K, G, *x.shape[2:]), kr)
        return jnp.exp(scores * SPEC.scale).reshape(*x.shape[:3], tokens)

    monkeypatch.setattr(reference, "query_features", phi)
    monkeypatch.setattr(reference, "key_features", psi)
    maps = FeatureMaps(K * G, K, H, 16, tokens).init(
        jax.random.key(0), *(jnp.asarray(x, jnp.float32) for x in (q, k))
    )["params"]
    policy = replace(base, name="oracle", tiers=(*base.tiers, LowRank(rank=tokens)))
    if base.positions == "in_cache":  # distances in the cache would differ from the full ones
        policy = replace(policy, positions="absolute", tiers=(*streaming(
            base.sinks, base.window, positions="absolute").tiers, policy.tiers[-1]))  # fmt: skip
    found = Layer(policy, aux={"feature_map": maps}).stream(q, k, v)
    qr = np.stack([rotated(q[0][:, t], t) for t in range(tokens)], axis=1)
    for t in range(tokens):
        for n in range(K * G):
            keys = np.asarray(kr)[n // G, : t + 1]
            expected = softmax_attention(qr[n, t], keys, v[0][n // G, : t + 1])
            np.testing.assert_allclose(found[0, n, t], expected, atol=1e-4)


@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("shift", [-200.0, -80.0, 0.0, 200.0])
def test_extreme_logits_stay_finite_and_right(shift, noise):
    """All token logits at or near `shift`, the low-rank sum near exp(shift / 3)."""
    keys = jax.random.split(jax.random.key(0), 2)
    q, v = jnp.ones((1, 1, 1, 1, H)), jax.random.normal(keys[0], (1, 1, 4, H))
    k = noise * jax.random.normal(keys[1], (1, 1, 4, H)) + shift / H / SPEC.scale
    distance, visible = jnp.zeros((1, 1, 1, 4), jnp.int32), jnp.ones((1, 1, 1, 4), bool)
    tokens = partial_attention(SPEC, q, k, v, distance, visible)
    phi, den = 0.7, np.exp(shift / 3)
    num = np.arange(H, dtype=np.float64) * den
    state = lowrank.LowRankState(
        num=jnp.asarray(num, jnp.float32)[None, None, None], den=jnp.full((1, 1, 1), den)
    )
    low = reference.seen(jnp.full((1, 1, 1, 1, 1), phi), state.num, state.den)
    found = np.asarray(finish(merge(tokens, low)))[0, 0, 0, 0]
    logits = (np.asarray(k, np.float64)[0, 0] @ np.ones(H)) * SPEC.scale
    top = max(logits.max(), np.log(phi * den))
    p, low_weight = np.exp(logits - top), np.exp(np.log(phi * den) - top)
    expected = (p @ np.asarray(v)[0, 0] + low_weight * np.arange(H)) / (p.sum() + low_weight)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_an_empty_state_is_the_identity_of_the_merge():
    policy = over(streaming(2, 5))
    layer = Layer(policy, aux=kernels())
    segment = policy.tiers[-1].segments(layer.state[-1], layer.aux, jnp.zeros(1))[0]
    partial = segment.partial(SPEC, jnp.ones((1, K, G, 1, H)), NOWHERE, None)
    assert (partial.sum == 0).all() and (partial.max == NEGATIVE).all() and not partial.acc.any()


def test_missing_kernels_alibi_and_sliding_windows_are_refused():
    policy = over(streaming(2, 5))
    with pytest.raises(ValueError, match=r"use ji.less\(base_policy, feature_maps\)"):
        Layer(policy).push(*random_qkv(1))
    for model, message in (("mpt", "ALiBi"), ("sliding", "sliding windows")):
        with pytest.raises(ValueError, match=message):
            params = abstract_params(CONFIGS[model], jnp.float32)
            stack.init_cache(CONFIGS[model], params, policy, 1, 64)
