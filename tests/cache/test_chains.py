"""What every policy promises about chains of tokens: chunking, ragged rows, padding, isolation."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import testing
from jaxinfer.cache.context import chain_context
from jaxinfer.cache.presets import full
from jaxinfer.testing.chains import LENGTH, SPLITS
from jaxinfer.testing.compare import assert_same, close, row_of
from jaxinfer.testing.stepper import Stepper
from tests.factories import CONFIGS, random_tokens
from tests.policies import MAIN_MODELS, MATRIX, settings, with_random_feature_maps

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
EXACT = [param for param in MAIN if param.values[1] in [case.easy() for case in MATRIX]]
NARROW = [pytest.param(*param.values, "cpu", id=f"{param.id}-cpu") for param in EXACT]
NARROW += [slow_but_on_llama(param, "gpu") for param in EXACT]
INVARIANT = [param for param in ALL if param.values[1].chunk_invariant]


@pytest.fixture(scope="module")
def tokens():
    return random_tokens(1, LENGTH)


@pytest.mark.parametrize("model, policy", EASY)
@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
def test_a_budget_that_loses_nothing_equals_the_forward_without_a_cache(model, policy, sizes):
    testing.check_full_budget(policy, model, sizes)


@pytest.mark.parametrize("model, policy", INVARIANT)
@pytest.mark.parametrize("sizes", list(SPLITS.values())[1:], ids=list(SPLITS)[1:])
def test_chunks_of_any_size_equal_token_by_token(model, policy, sizes):
    testing.check_chunks(policy, model, sizes)


@pytest.mark.parametrize("model, policy", SMOKE)
def test_ragged_rows_equal_every_row_alone(model, policy):
    testing.check_ragged_rows(policy, model)


@pytest.mark.parametrize("model, policy", HARD)
def test_padded_queries_stay_finite_and_idle_rows_keep_their_state(model, policy):
    testing.check_idle_rows(policy, model)


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
    testing.check_bytes(policy, case.bytes_per_row, dtype=dtype, platform=backend)


@pytest.mark.parametrize("model, policy", MAIN_HARD)
def test_the_gpu_layout_gives_the_same_logits(model, policy, tokens):
    sizes = SPLITS["odd chunks"]
    results = []
    for backend in BACKENDS:
        stepper = Stepper(model, policy, platform=backend)
        results.append(stepper.run(stepper.cache(), tokens, sizes)[1])
    np.testing.assert_allclose(results[0], results[1], **close())


@pytest.mark.parametrize("model, policy, backend", NARROW)
def test_bfloat16_follows_its_own_forward(model, policy, backend):
    testing.check_full_budget(policy, model, dtype="bfloat16", platform=backend)


@pytest.mark.parametrize("model, policy", GROWING)
def test_growing_keeps_what_is_stored(model, policy):
    testing.check_growth(policy, model)


@pytest.mark.parametrize("case", MATRIX, ids=lambda case: case.name)
@pytest.mark.parametrize("setting", ["easy", "hard"])
def test_an_equal_policy_does_not_retrace(case, setting):
    make, traces = getattr(case, setting), []
    testing.check_equal_policies(make)

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
        stepper = Stepper(model, with_random_feature_maps(policy, CONFIGS[model]))
        cache, _ = stepper.step(stepper.cache(), tokens[:, :8])
        ctx = chain_context(cache.length, jnp.asarray([3], jnp.int32), 4)
        _, fresh = stepper.read(cache, tokens[:, 8:12], ctx)
        for items in fresh:
            parts = jax.tree.leaves(
                items.attn_weight
            )  # of a chain: summed over its three valid queries
            total = sum(np.asarray(part).sum(axis=-1) for part in parts)
            np.testing.assert_allclose(total, 3 * CONFIGS[model].group_size, rtol=1e-5)
