"""LESS in parallel form against simulations with masks, recurrences and the cache itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxinfer.cache.attend import attend, commit_layer, rotations
from jaxinfer.cache.base import Geometry
from jaxinfer.cache.context import chain_context
from jaxinfer.cache.lowrank import LowRank
from jaxinfer.cache.policy import Policy
from jaxinfer.cache.presets import h2o, streaming
from jaxinfer.nn.feature_map import FeatureMaps
from jaxinfer.ops.attention import AttentionSpec
from jaxinfer.runtime.backend import Backend
from jaxinfer.train.less.objective import (
    Eviction,
    Kept,
    add_low_rank,
    leaving_order,
    strided_low_rank,
)
from jaxinfer.train.less.objective import kept_attention as eager_kept_attention
from jaxinfer.train.less.objective import less_attention as eager_less_attention
from tests.cache.pushing import committing

B, N, K, T, H, R = 2, 4, 2, 30, 8, 3
G = N // K
SPEC = AttentionSpec(scale=H**-0.5)
EVICTIONS = [
    Eviction(heavy=3, recent=4),
    Eviction(heavy=1, recent=1),
    Eviction(heavy=0, recent=5),
    Eviction(sinks=2, recent=5),
    Eviction(sinks=1, heavy=2, recent=3),
]
kept_attention = jax.jit(eager_kept_attention, static_argnums=(0, 1))
less_attention = jax.jit(eager_less_attention)
HUGE = Eviction(heavy=T, recent=T)


def qkv(seed: int = 0, size: float = 1.5):
    keys = jax.random.split(jax.random.key(seed), 3)
    heads = (N, K, K)
    return [size * jax.random.normal(key, (B, n, T, H)) for key, n in zip(keys, heads, strict=True)]


def features(seed: int = 1):
    """Any non-negative phi and psi."""
    keys = jax.random.split(jax.random.key(seed))
    return [jax.random.uniform(k, (B, n, T, R)) for k, n in zip(keys, (N, K), strict=True)]


def softmax(x):
    x = np.exp(x - x.max())
    return x / x.sum()


def simulated(eviction: Eviction, q, k, v, dense: bool):
    """(out, leave_row) by a mask over all tokens, one row and one head at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    heads, group = k.shape[1], q.shape[1] // k.shape[1]
    out, leave = np.zeros_like(q), np.full((B, heads, T), T)
    for b, head in np.ndindex(B, heads):
        score, here = np.zeros(T), np.zeros(T, bool)
        for row in range(T):
            here[row] = True
            tokens = np.flatnonzero(here)
            for n in range(head * group, (head + 1) * group):
                logits = k[b, head] @ q[b, n, row] * SPEC.scale
                out[b, n, row] = softmax(logits[tokens]) @ v[b, head, tokens]
                past = np.arange(row + 1) if dense else tokens
                received = np.zeros(T)
                received[past] = softmax(logits[past])
                score += received * here
            if row >= eviction.capacity:
                able = [t for t in tokens if eviction.sinks <= t <= row - eviction.recent]
                goes = min(able, key=lambda t: (score[t], -t))
                here[goes], leave[b, head, goes] = False, row + 1
    return out, leave


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("eviction", EVICTIONS, ids=str)
def test_slots_equal_a_mask_over_all_tokens(eviction, dense):
    q, k, v = qkv()
    lse = kept_attention(HUGE, SPEC, q, k, v).lse if dense else None
    found = kept_attention(eviction, SPEC, q, k, v, lse)
    out, leave = simulated(eviction, q, k, v, dense)
    np.testing.assert_array_equal(found.leave_row, leave)
    np.testing.assert_allclose(found.out, out, atol=2e-5)


@pytest.mark.parametrize("group", [1, 4])
def test_any_number_of_queries_may_share_a_head(group):
    q, k, v = qkv()
    k, v = (jnp.tile(x, (1, 2, 1, 1))[:, : N // group] for x in (k, v))
    found = kept_attention(EVICTIONS[0], SPEC, q, k, v)
    out, leave = simulated(EVICTIONS[0], q, k, v, False)
    np.testing.assert_array_equal(found.leave_row, leave)
    np.testing.assert_allclose(found.out, out, atol=2e-5)


@pytest.mark.parametrize("eviction", EVICTIONS, ids=str)
def test_one_token_leaves_per_row_and_protected_ones_stay(eviction):
    leave = np.asarray(kept_attention(eviction, SPEC, *qkv(3)).leave_row)
    assert (leave[..., : eviction.sinks] == T).all()
    assert (leave - np.arange(T) > eviction.recent)[leave < T].all()
    for row in range(T):
        gone = (leave <= row).sum(axis=-1)
        assert (gone == max(row - eviction.capacity, 0)).all()
    order = leaving_order(leave, eviction.capacity)
    rows = np.take_along_axis(leave, order, axis=-1)
    assert (rows == eviction.capacity + 1 + np.arange(order.shape[-1])).all()


def test_a_window_drops_tokens_by_age():
    leave = np.asarray(kept_attention(Eviction(sinks=2, recent=5), SPEC, *qkv()).leave_row)
    expected = np.minimum(np.where(np.arange(T) < 2, T, np.arange(T) + 6), T)
    assert (leave == expected).all()


def test_enough_room_gives_dense_attention():
    q, k, v = qkv()
    kept = kept_attention(HUGE, SPEC, q, k, v)
    assert (kept.leave_row == T).all()
    found = less_attention(kept, v, *features())
    assert (found == kept.out).all()
    expected, _ = simulated(HUGE, q, k, v, False)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def recurrent(eviction, q, k, v, phi, psi, leave):
    """Equations 3-5 of the paper token by token, in float64; also the last z."""
    q, k, v, phi, psi = (np.asarray(x, np.float64) for x in (q, k, v, phi, psi))
    out, norms = np.zeros_like(q), np.zeros((B, K, R))
    for b, head in np.ndindex(B, K):
        state, norm = np.zeros((R, H)), np.zeros(R)
        for row in range(T):
            for t in np.flatnonzero(leave[b, head] == row):
                state += np.outer(psi[b, head, t], v[b, head, t])
                norm += psi[b, head, t]
            see = np.flatnonzero((np.arange(T) <= row) & (row < leave[b, head]))
            for n in range(head * G, head * G + G):
                weight = np.exp(k[b, head, see] @ q[b, n, row] * SPEC.scale)
                top = phi[b, n, row] @ state + weight @ v[b, head, see]
                out[b, n, row] = top / (phi[b, n, row] @ norm + weight.sum())
        norms[b, head] = norm
    return out, norms


@pytest.mark.parametrize("eviction", EVICTIONS, ids=str)
def test_the_parallel_form_equals_the_recurrence(eviction):
    q, k, v = qkv()
    phi, psi = features()
    kept = kept_attention(eviction, SPEC, q, k, v)
    leave = np.asarray(kept.leave_row)
    expected, norms = recurrent(eviction, q, k, v, phi, psi, leave)
    np.testing.assert_allclose(less_attention(kept, v, phi, psi), expected, atol=2e-5)
    gone = np.where((leave < T)[..., None], psi, 0).sum(axis=2)
    np.testing.assert_allclose(norms, gone, rtol=1e-5)


@pytest.mark.parametrize("base", [h2o(3, 4), streaming(2, 5, positions="absolute")], ids=str)
def test_the_parallel_form_equals_the_cache(base: Policy):
    eviction = (
        Eviction(heavy=3, recent=4) if base.weigh_keys == "always" else Eviction(sinks=2, recent=5)
    )
    policy = Policy(
        name="less", tiers=(*base.tiers, LowRank(rank=R)), weigh_keys=base.weigh_keys,
        sinks=base.sinks, window=base.window,
    )  # fmt: skip
    q, k, v = qkv()
    maps = FeatureMaps(N, K, H, 16, R)
    kernels = maps.init(jax.random.key(5), q, k)["params"]
    kernels |= {name: jnp.ones((K, R)) for name in ("scale", "mix_scale")}
    aux = {"feature_map": kernels}
    geometry = Geometry(num_kv_heads=K, head_dim=H, capacity=64, backend=Backend(block=None))
    state = tuple(tier.init(geometry, B) for tier in policy.tiers)

    @jax.jit
    def step(state, length, q, k, v):
        ctx = chain_context(length, jnp.ones((B,), jnp.int32), 1)
        y, fresh = attend(
            policy, SPEC, state, aux, q, k, v, ctx, rotations(policy, None, ctx)
        )  # fmt: skip
        one = jnp.ones((B,), jnp.int32)
        return commit_layer(policy, state, aux, fresh, committing(length, one, length)), y

    found = []
    for t in range(T):
        row = (x[:, :, t : t + 1] for x in (q, k, v))
        state, y = step(state, jnp.full((B,), t, jnp.int32), *row)
        found.append(y[:, :, 0])
    phi, psi = maps.apply({"params": kernels}, q, k)
    expected = less_attention(kept_attention(eviction, SPEC, q, k, v), v, phi, psi)
    np.testing.assert_allclose(jnp.stack(found, axis=2), expected, atol=2e-5)


@pytest.mark.parametrize("stride", [1, 3, 5])
def test_strided_rows_equal_the_reference(stride):
    eviction = EVICTIONS[0]
    q, k, v = qkv()
    phi, psi = features()
    kept = kept_attention(eviction, SPEC, q, k, v)
    order = leaving_order(np.asarray(kept.leave_row), eviction.capacity)
    count = order.shape[-1] // stride
    order = order[..., : count * stride, None]
    rows = eviction.capacity + stride * np.arange(1, count + 1)
    mass, total = strided_low_rank(
        phi[:, :, rows],
        jnp.take_along_axis(psi, order, axis=2),
        jnp.take_along_axis(v, order, axis=2),
    )
    found = add_low_rank(kept.out[:, :, rows], kept.lse[:, :, rows], mass, total)
    expected = less_attention(kept, v, phi, psi)[:, :, rows]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_features_that_give_the_exponential_give_full_attention():
    q, k, v = qkv()
    logits = jnp.einsum("bkgth,bkjh->bkgtj", q.reshape(B, K, G, T, H), k) * SPEC.scale
    phi = jnp.exp(logits).reshape(B, N, T, T)
    psi = jnp.broadcast_to(jnp.eye(T), (B, K, T, T))
    found = less_attention(kept_attention(EVICTIONS[1], SPEC, q, k, v), v, phi, psi)
    expected = kept_attention(HUGE, SPEC, q, k, v).out
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_all_probabilities_sum_to_one():
    q, k, v = qkv()
    kept = kept_attention(EVICTIONS[0], SPEC, q, k, jnp.ones_like(v))
    found = less_attention(kept, jnp.ones_like(v), *features())
    np.testing.assert_allclose(found, 1, atol=1e-6)


def test_silent_features_leave_the_policy_alone_bit_for_bit():
    q, k, v = qkv()
    phi, psi = features()
    kept = kept_attention(EVICTIONS[0], SPEC, q, k, v)
    assert (less_attention(kept, v, phi, 0 * psi) == kept.out).all()


def test_new_kernels_stay_close_to_the_policy():
    q, k, v = qkv()
    maps = FeatureMaps(N, K, H, 16, R)
    phi, psi = maps.apply(maps.init(jax.random.key(0), q, k), q, k)
    kept = kept_attention(EVICTIONS[0], SPEC, q, k, v)
    found = less_attention(kept, v, phi, psi)
    assert jnp.linalg.norm(found - kept.out) < 1e-3 * jnp.linalg.norm(kept.out)


@pytest.mark.parametrize("lse", [-300.0, -200.0, -80.0, 0.0, 80.0, 200.0, 300.0])
@pytest.mark.parametrize("total", [0.0, 1e-30, 1.0, 1e30])
def test_extreme_logits_give_finite_values_and_gradients(lse, total):
    kept, mass = np.full((1, 1, 4), 2.0), np.full((1, 1, 4), 3.0 * total)
    arguments = [jnp.asarray(x, jnp.float32) for x in (kept, np.full((1, 1), lse), mass, [[total]])]
    found = add_low_rank(*arguments)
    share = 1 / (1 + np.exp(np.float64(lse) - np.log(total))) if total else 0.0
    np.testing.assert_allclose(found, 2 + share, rtol=1e-5)
    grads = jax.grad(lambda *x: add_low_rank(*x).sum(), argnums=(0, 1, 2, 3))(*arguments)
    assert all(np.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("size", [8.0, 12.0])
def test_large_queries_and_keys_stay_finite(size):
    q, k, v = qkv(size=size)  # logits up to several hundreds
    found = less_attention(kept_attention(EVICTIONS[0], SPEC, q, k, v), v, *features())
    assert np.isfinite(found).all()


def test_gradients_equal_finite_differences():
    q, k, v = qkv()
    phi, psi = features()
    kept = kept_attention(EVICTIONS[0], SPEC, q, k, v)

    def loss(phi, psi):
        return jnp.square(less_attention(kept, v, jnp.asarray(phi), jnp.asarray(psi))).mean()

    check_grads(loss, (phi, psi), order=1, modes=["rev"], eps=1e-2, rtol=2e-2, atol=1e-3)


def test_equal_scores_let_the_newest_candidate_go():
    q, k, v = (jnp.zeros_like(x) for x in qkv())
    lse = jnp.full((B, N, T), 1e4)  # nobody receives anything
    leave = kept_attention(Eviction(heavy=2, recent=3), SPEC, q, k, v, lse).leave_row
    assert (leave[..., :2] == T).all()
    assert (leave[..., 2 : T - 4] == np.arange(2, T - 4) + 4).all()


def test_more_memory_is_shared_between_both_kinds():
    assert Eviction(heavy=3, recent=4).widened(8) == Eviction(heavy=7, recent=8)
    assert Eviction(sinks=2, recent=4).widened(8) == Eviction(sinks=2, recent=12)


def test_policies_and_models_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="recent >= 1"):
        Eviction(heavy=4, recent=0)
    with pytest.raises(ValueError, match="ALiBi"):
        kept_attention(EVICTIONS[0], AttentionSpec(scale=1.0, slopes=(1.0,) * N), *qkv())


def test_kept_is_a_tree():
    kept = kept_attention(EVICTIONS[0], SPEC, *qkv())
    assert isinstance(jax.tree.map(lambda x: x, kept), Kept)
