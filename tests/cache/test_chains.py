"""What every policy promises about chains of tokens: chunking, ragged rows, padding, isolation."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.cache.base import bytes_of
from jaxinfer.cache.context import chain_context
from jaxinfer.cache.presets import full
from jaxinfer.models.stack import cache_geometry, grow_cache
from tests.cache.stepping import Stepper, assert_same, close, row_of
from tests.factories import CONFIGS, random_tokens
from tests.policies import MAIN_MODELS, MATRIX, settings

LENGTH = 24
ALL, EASY, HARD = settings(), settings(("easy",)), settings(("hard",))
SMOKE = settings(("hard",), smoke=True)
MAIN, MAIN_HARD = (
    [param for param in params if param.values[0] in MAIN_MODELS] for params in (ALL, HARD)
)
BACKENDS = ("cpu", "gpu")


def slow_but_on_llama(param, *values):
    """The parameter with `values` behind it."""
    marks = () if param.values[0] == "llama" else pytest.mark.slow
    return pytest.param(*param.values, *values, id="-".join([param.id, *values]), marks=marks)


# Growing does not know the model, and the layout serves the other one in float32 too.
GROWING = [slow_but_on_llama(param) for param in MAIN_HARD]
NARROW = [pytest.param(*param.values, "cpu", id=f"{param.id}-cpu") for param in MAIN]
NARROW += [slow_but_on_llama(param, "gpu") for param in MAIN]
SPLITS = {
    "one token at a time": (1,) * LENGTH,
    "full chunks": (8, 8, 8),
    "odd chunks": (5, 8, 1, 1, 7, 2),
}


@pytest.fixture(scope="module")
def tokens():
    return random_tokens(1, LENGTH)


@pytest.mark.parametrize("model, policy", EASY)
@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
def test_a_budget_that_loses_nothing_equals_the_forward_without_a_cache(
    model, policy, sizes, tokens
):
    stepper = Stepper(model, policy)
    _, logits = stepper.run(stepper.cache(), tokens, sizes)
    np.testing.assert_allclose(logits, stepper.plain(tokens), **close())


@pytest.mark.parametrize("model, policy", ALL)
@pytest.mark.parametrize("sizes", list(SPLITS.values())[1:], ids=list(SPLITS)[1:])
def test_chunks_of_any_size_equal_token_by_token(model, policy, sizes, tokens):
    if not policy.chunk_invariant:
        pytest.skip(f"{policy.name} declares that chunks matter")
    stepper = Stepper(model, policy)
    cache, logits = stepper.run(stepper.cache(), tokens, sizes)
    expected_cache, expected = stepper.run(stepper.cache(), tokens, SPLITS["one token at a time"])
    np.testing.assert_allclose(logits, expected, **close())
    np.testing.assert_array_equal(cache.length, expected_cache.length)


@pytest.mark.parametrize("model, policy", SMOKE)
def test_ragged_rows_equal_every_row_alone(model, policy):
    stepper = Stepper(model, policy)
    tokens = random_tokens(3, 16, seed=1)
    counts = np.array([[8, 3, 0], [5, 8, 1]])  # two steps of three rows
    cache, found = stepper.cache(3), [[], [], []]
    for count in counts:
        done = np.asarray(cache.length)
        piece = np.stack([np.take(tokens[b], range(done[b], done[b] + 8)) for b in range(3)])
        cache, logits = stepper.step(cache, piece, count)
        for b in range(3):
            found[b].append(logits[b, : count[b]])
    for b in range(3):
        alone, expected, first = stepper.cache(), [], 0
        for count in counts[:, b]:
            if count:
                alone, logits = stepper.step(alone, tokens[b : b + 1, first : first + count])
                expected.append(logits[0])
            first += count
        np.testing.assert_allclose(np.concatenate(found[b]), np.concatenate(expected), **close())
        assert int(cache.length[b]) == int(alone.length[0]) == counts[:, b].sum()


@pytest.mark.parametrize("model, policy", HARD)
def test_padded_queries_stay_finite(model, policy):
    stepper = Stepper(model, policy)
    cache = stepper.cache(3)
    for count in ([8, 3, 0], [0, 0, 0], [8, 8, 1]):
        cache, logits = stepper.step(cache, random_tokens(3, 8), count)
        assert np.isfinite(logits).all()


@pytest.mark.parametrize("model, policy", HARD)
def test_a_row_that_commits_nothing_keeps_its_state(model, policy):
    stepper = Stepper(model, policy)
    before, _ = stepper.step(stepper.cache(3), random_tokens(3, 8))
    after, _ = stepper.step(before, random_tokens(3, 8, seed=1), [8, 0, 3])
    assert_same(row_of(after.layers, 1), row_of(before.layers, 1))
    assert after.length.tolist() == [16, 8, 11]


@pytest.mark.parametrize("model, policy", MAIN_HARD)
def test_a_row_of_nan_does_not_reach_other_rows(model, policy):
    stepper = Stepper(model, policy)
    tokens = random_tokens(3, 8)
    clean, _ = stepper.step(stepper.cache(3), tokens)
    poison = dict(stepper.params, embed=dict(stepper.params["embed"]))
    poison["embed"]["tokens"] = poison["embed"]["tokens"].at[60].set(jnp.nan)
    stepper.params = poison
    bad = tokens.copy()
    bad[0, 3] = 60
    poisoned, _ = stepper.step(stepper.cache(3), bad)
    more = random_tokens(3, 8, seed=1)
    more[more == 60] = 0
    (clean, expected), (poisoned, logits) = stepper.step(clean, more), stepper.step(poisoned, more)
    assert np.isnan(logits[0]).any()
    for row in (1, 2):
        assert_same(logits[row], expected[row])
        assert_same(row_of(poisoned, row), row_of(clean, row))


@pytest.mark.parametrize("case", MATRIX, ids=lambda case: case.name)
@pytest.mark.parametrize("setting", ["easy", "hard"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_allocated_bytes_follow_the_documented_formula(case, setting, dtype, backend):
    policy = getattr(case, setting)()
    stepper = Stepper("llama", policy, dtype, backend)
    cache = stepper.cache(batch=3, capacity=96)
    geometry = cache_geometry(stepper.cfg, 96, dtype, stepper.backend)
    expected = 3 * stepper.cfg.num_layers * case.bytes_per_row(policy, geometry)
    declared = sum(tier.bytes_per_row(geometry) for tier in policy.tiers)
    assert bytes_of(cache.layers) == expected
    assert 3 * stepper.cfg.num_layers * declared == expected


@pytest.mark.parametrize("model, policy", MAIN_HARD)
def test_the_gpu_layout_gives_the_same_logits(model, policy, tokens):
    sizes = SPLITS["odd chunks"]
    results = []
    for backend in BACKENDS:
        stepper = Stepper(model, policy, backend=backend)
        results.append(stepper.run(stepper.cache(), tokens, sizes)[1])
    np.testing.assert_allclose(results[0], results[1], **close())


@pytest.mark.parametrize("model, policy, backend", NARROW)
def test_bfloat16_follows_its_own_forward(model, policy, backend, tokens):
    if policy not in [case.easy() for case in MATRIX]:
        pytest.skip("only a budget that loses nothing equals the plain forward")
    stepper = Stepper(model, policy, "bfloat16", backend)
    _, logits = stepper.run(stepper.cache(), tokens, SPLITS["odd chunks"])
    np.testing.assert_allclose(logits, stepper.plain(tokens), **close("bfloat16"))


@pytest.mark.parametrize("model, policy", GROWING)
def test_growing_keeps_what_is_stored(model, policy, tokens):
    stepper = Stepper(model, policy)
    cache, _ = stepper.run(stepper.cache(), tokens[:, :13], (8, 5))
    larger = grow_cache(stepper.cfg, cache, 128)
    _, expected = stepper.step(cache, tokens[:, 13:21])
    grown, logits = stepper.step(larger, tokens[:, 13:21])
    np.testing.assert_allclose(logits, expected, **close())
    assert grown.length.tolist() == [21]


@pytest.mark.parametrize("model, policy", MAIN_HARD)
def test_growing_to_less_changes_nothing(model, policy, tokens):
    stepper = Stepper(model, policy)
    cache, _ = stepper.step(stepper.cache(), tokens[:, :8])
    assert_same(grow_cache(stepper.cfg, cache, 16), cache)


@pytest.mark.parametrize("case", MATRIX, ids=lambda case: case.name)
@pytest.mark.parametrize("setting", ["easy", "hard"])
def test_an_equal_policy_does_not_retrace(case, setting):
    make, traces = getattr(case, setting), []
    assert make() == make() and hash(make()) == hash(make()) and make() is not make()

    @jax.jit
    def length(cache):
        traces.append(1)
        return cache.length

    for _ in range(2):
        length(Stepper("llama", make()).cache())
    assert len(traces) == 1


@pytest.mark.parametrize("model", MAIN_MODELS)
def test_attention_weight_of_every_query_sums_to_the_group_size(model, tokens):
    served = [case.hard() for case in MATRIX if model not in case.refuses]
    observing = [policy for policy in served if policy.weigh_keys == "always"]
    for policy in [replace(full(), weigh_keys="always"), *observing]:
        stepper = Stepper(model, policy)
        cache, _ = stepper.step(stepper.cache(), tokens[:, :8])
        ctx = chain_context(cache.length, jnp.asarray([3], jnp.int32), 4)
        _, fresh = stepper.read(cache, tokens[:, 8:12], ctx)
        for items in fresh:
            parts = jax.tree.leaves(
                items.attn_weight
            )  # of a chain: summed over its three valid queries
            total = sum(np.asarray(part).sum(axis=-1) for part in parts)
            np.testing.assert_allclose(total, 3 * CONFIGS[model].group_size, rtol=1e-5)
