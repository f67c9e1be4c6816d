"""H2O against a simulation with Python lists: what is kept, what is seen, what is spilled."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.cache.base import Geometry, Items
from jaxinfer.cache.context import PushContext
from jaxinfer.cache.heavy import Heavy
from jaxinfer.cache.presets import h2o
from jaxinfer.cache.ring import Ring, tokens_of
from jaxinfer.testing.models import random_tokens
from jaxinfer.testing.quick import quick_jit
from jaxinfer.testing.stepper import Stepper
from tests.cache.layer import SPEC, G, H, K, Layer, random_qkv, rotated
from tests.cache.pushing import pushing

HEAVY, RECENT = 4, 3


class Simulation:
    """One row of H2O: per key/value head, positions kept and the probability each has received."""

    def __init__(self, q, k, v, heavy=HEAVY, recent=RECENT):
        self.q = np.stack([rotated(q[:, t], t) for t in range(q.shape[1])], axis=1)
        self.k = np.stack([rotated(k[:, t], t) for t in range(k.shape[1])], axis=1)
        self.v, self.heavy, self.recent = v, heavy, recent
        self.score: list[dict[int, float]] = [{} for _ in range(K)]
        self.evicted: list[list[int]] = [[] for _ in range(K)]

    def read(self, first: int, count: int) -> np.ndarray:
        """Output [N, count, H] of the tokens from `first` on; then what exceeds the budget goes."""
        out = np.zeros((K * G, count, H))
        for kv in range(K):
            stored = sorted(self.score[kv])
            total = {t: self.score[kv].get(t, 0.0) for t in [*stored, *range(first, first + count)]}
            for i in range(count):
                seen = [*stored, *range(first, first + i + 1)]
                for head in range(kv * G, (kv + 1) * G):
                    scores = self.k[kv, seen] @ self.q[head, first + i] * SPEC.scale
                    p = np.exp(scores - scores.max())
                    p /= p.sum()
                    out[head, i] = p @ self.v[kv, seen]
                    for t, attn_weight in zip(seen, p, strict=True):
                        total[t] += attn_weight
            newest = first + count
            old = sorted((t for t in total if t < newest - self.recent), key=lambda t: -total[t])
            self.evicted[kv] += old[self.heavy :]
            kept = [*old[: self.heavy], *(t for t in total if t >= newest - self.recent)]
            self.score[kv] = {t: total[t] for t in kept}
        return out


def kept_positions(layer: Layer, row: int = 0) -> list[set[int]]:
    """What each head of the cache holds."""
    ring, heavy = layer.state
    n = int(layer.length[row])
    recent = set(range(max(n - RECENT, 0), n))
    some = min(max(n - RECENT, 0), HEAVY)
    return [recent | set(np.asarray(heavy.pos)[row, head, :some].tolist()) for head in range(K)]


@pytest.mark.parametrize("prompt", [1, 5, HEAVY + RECENT, 12, 20])
def test_prompt_and_steps_equal_the_simulation(prompt):
    q, k, v = random_qkv(32)
    layer, simulation = Layer(h2o(HEAVY, RECENT)), Simulation(q[0], k[0], v[0])
    found = layer.push(*(x[:, :, :prompt] for x in (q, k, v)))
    np.testing.assert_allclose(found[0], simulation.read(0, prompt), atol=2e-5)
    for t in range(prompt, 32):
        found = layer.push(*(x[:, :, t : t + 1] for x in (q, k, v)))
        np.testing.assert_allclose(found[0], simulation.read(t, 1), atol=2e-5)
        assert kept_positions(layer) == [set(score) for score in simulation.score]
    attn_weight = np.concatenate([np.asarray(x.attn_weight)[0] for x in layer.state], axis=-1)
    expected = [sum(score.values()) for score in simulation.score]
    np.testing.assert_allclose(attn_weight.sum(axis=-1), expected, rtol=1e-5)


def test_heads_choose_differently_and_the_recent_ones_stay():
    q, k, v = random_qkv(40)
    layer = Layer(h2o(HEAVY, RECENT))
    layer.stream(q, k, v)
    first, second = kept_positions(layer)
    assert first != second and {37, 38, 39} <= first & second


def test_the_order_of_slots_does_not_matter():
    q, k, v = random_qkv(40)
    layer, permuted = Layer(h2o(HEAVY, RECENT)), Layer(h2o(HEAVY, RECENT))
    layer.push(*(x[:, :, :30] for x in (q, k, v)))
    ring, heavy = layer.state
    order = np.random.default_rng(0).permutation(HEAVY)
    permuted.state = ring, replace(
        heavy, k=heavy.k[..., order], v=heavy.v[:, :, order],
        attn_weight=heavy.attn_weight[..., order], pos=heavy.pos[..., order],
    )  # fmt: skip
    permuted.length = layer.length
    rest = [x[:, :, 30:] for x in (q, k, v)]
    np.testing.assert_allclose(layer.stream(*rest), permuted.stream(*rest), atol=2e-6)
    assert kept_positions(layer) == kept_positions(permuted)


@quick_jit
def push(tier, state, items, n_in, count):
    return tier.push(state, None, items, pushing(n_in, count, jnp.zeros((), jnp.int32)))


@quick_jit
def choices(tier, state, items, n_in, count):
    """Where a single token goes by search, and what the sort chooses."""
    return tier._place_of_one(state, items, count), tier._choose(state, items, n_in, count)


def push_random(tier, state, n_in, tokens, seed, count=None):
    """Pushes `tokens` items whose position and key tell who they are."""
    rng = np.random.default_rng(seed)
    pos = np.broadcast_to(n_in + np.arange(tokens), (1, K, tokens)).astype(np.int32)
    k = np.broadcast_to(pos[..., None], (1, K, tokens, H)).astype(np.float32)
    attn_weight = rng.random((1, K, tokens)).astype(np.float32)
    items = Items(
        k=jnp.asarray(k),
        v=jnp.asarray(-k),
        pos=jnp.asarray(pos),
        attn_weight=jnp.asarray(attn_weight),
    )
    count = tokens if count is None else count
    n, c = jnp.asarray([n_in], jnp.int32), jnp.asarray([count], jnp.int32)
    return push(tier, state, items, n, c), attn_weight


# Below, at and above the tier's size of 5.
@pytest.mark.parametrize("sizes", [(1,) * 14, (5, 9), (3, 1, 5, 5), (14,), (5, 0, 9)])
def test_every_token_is_kept_or_spilled_exactly_once(sizes):
    tier = Heavy(size=5)
    state = Layer(h2o(5, 1)).state[1]
    n, spilled, attn_weights = 0, [[] for _ in range(K)], [{} for _ in range(K)]
    for seed, size in enumerate(sizes):
        if size == 0:
            (state, _, gone), _ = push_random(tier, state, n, 3, seed, count=0)
            assert gone.tolist() == [0]
            continue
        (state, items, gone), attn_weight = push_random(tier, state, n, size, seed)
        for head in range(K):
            attn_weights[head] |= {n + i: attn_weight[0, head, i] for i in range(size)}
            leave = np.asarray(items.pos)[0, head, : int(gone[0])]
            assert (np.asarray(items.k)[0, head, : int(gone[0]), 0] == leave).all()
            assert (np.asarray(items.v)[0, head, : int(gone[0]), 0] == -leave).all()
            spilled[head] += leave.tolist()
        n += size
    for head in range(K):
        kept = np.asarray(state.pos)[0, head].tolist()
        assert sorted(kept + spilled[head]) == list(range(14))
        if len(sizes) == 1:  # all at once: exactly the largest
            assert set(kept) == set(sorted(attn_weights[head], key=attn_weights[head].get)[-5:])


def test_one_token_at_a_time_and_the_sort_choose_alike():
    tier = Heavy(size=5)
    state = Layer(h2o(5, 1)).state[1]
    for n in range(12):
        (new, items, _), attn_weight = push_random(tier, state, n, 1, n)
        n_in, one = jnp.asarray([n], jnp.int32), jnp.ones((1,), jnp.int32)
        pushed = Items(k=items.k, v=items.v, pos=items.pos, attn_weight=jnp.asarray(attn_weight))
        quick, (index, gone) = choices(tier, state, pushed, n_in, one)
        np.testing.assert_array_equal(quick, index)
        if n >= 5:  # 5 is no slot, and stands for the new token among those that leave
            np.testing.assert_array_equal(quick, gone)
        state = new


def test_budgets_are_exact_and_shares_are_of_the_context():
    policy = h2o(0.025, 0.025).sized(2048)
    assert [tier.size for tier in policy.tiers] == [51, 51] and policy == h2o(51, 51)
    assert isinstance(policy.tiers[0], Ring) and policy.fixed_size
    with pytest.raises(ValueError, match="share of the context"):
        jax.eval_shape(lambda: Layer(h2o(0.5, 0.5)).state)


def test_a_share_is_exact_rounded_down_and_at_least_one_token():
    shares = [(0.1, 300, 30), (0.1, 65, 6), (0.29, 100, 29), (0.07, 100, 7), (1.0, 7, 7)]
    assert [tokens_of(share, n) for share, n, _ in shares] == [kept for *_, kept in shares]
    assert tokens_of(1e-9, 10) == tokens_of(0.1, 1) == 1 and tokens_of(5, 3) == 5


def test_rows_of_a_share_evict_as_their_own_whole_budgets():
    """The state of each row is that of a layer with its budget in tokens, its unused slots empty;
    what is spilled is the same, in chunks and one by one."""
    q, k, v = random_qkv(24)
    contexts, sized = [40, 20], h2o(0.1, 0.15).sized(64)
    both = Layer(sized, batch=2)
    both.state = tuple(
        tier.budgeted(state, contexts) for tier, state in zip(sized.tiers, both.state, strict=True)
    )
    alone = [Layer(h2o(4, 6)), Layer(h2o(2, 3))]
    first = 0
    for count in (5, 1, 1, 9, 1, 1, 1, 5):
        part = [x[:, :, first : first + count] for x in (q, k, v)]
        found = both.push(*(np.repeat(x, 2, axis=0) for x in part))
        for row, layer in enumerate(alone):
            np.testing.assert_allclose(found[row], layer.push(*part)[0], atol=2e-5)
            for mine, its in zip(both.state, layer.state, strict=True):
                slots = its.v.shape[2]
                np.testing.assert_allclose(mine.v[row, :, :slots], its.v[0], atol=1e-6)
                assert not np.asarray(mine.v[row, :, slots:]).any()
        first += count


def test_padded_queries_give_stored_keys_nothing():
    stepper, tokens = Stepper("llama", h2o(4, 3)), random_tokens(1, 8)
    cache, _ = stepper.step(stepper.cache(), tokens)
    exact, _ = stepper.step(cache, tokens[:, :2], size=2)
    padded, _ = stepper.step(cache, tokens[:, :2], size=8)  # six queries of padding
    for mine, its in zip(jax.tree.leaves(padded), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(mine, its, atol=1e-5)


@pytest.mark.parametrize("width", [1, 2])
def test_of_equal_weights_the_stored_token_stays(width):
    tier = Heavy(size=2)
    state, items, _ = push_random_items(tier, width)
    state = replace(state, attn_weight=jnp.ones_like(state.attn_weight))
    items = replace(items, attn_weight=jnp.ones(items.v.shape[:3], jnp.float32))
    n_in, count = jnp.asarray([2], jnp.int32), jnp.asarray([width], jnp.int32)
    ctx = PushContext(n_in=n_in, count=count, after=count, length=n_in)
    after, spilled, _ = tier.push(state, None, items, ctx)
    np.testing.assert_array_equal(after.pos, state.pos)
    np.testing.assert_array_equal(after.v, state.v)
    np.testing.assert_array_equal(spilled.pos, jnp.broadcast_to(items.pos, spilled.pos.shape))


def push_random_items(tier: Heavy, width: int):
    """A full state with tokens 0 and 1, and the items of `width` more."""
    geometry = Geometry(num_kv_heads=K, head_dim=H, capacity=8)
    state = replace(tier.init(geometry, 1), pos=jnp.broadcast_to(jnp.arange(2), (1, K, 2)))
    rng = np.random.default_rng(0)
    new = jnp.asarray(rng.standard_normal((1, K, width, H)), jnp.float32)
    return state, Items(k=new, v=new, pos=2 + jnp.arange(width)[None, None]), new
