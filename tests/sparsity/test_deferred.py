"""Keys and values that skipped heads owe (dejavu.md 2.8, 6.4): made later, they are the same."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.cache.base import Geometry, bytes_of
from jaxinfer.cache.policy import Policy
from jaxinfer.cache.presets import full, h2o, kivi, per_layer, streaming
from jaxinfer.inspection import gpu_target
from jaxinfer.inspection.decode_step import decode_case
from jaxinfer.models.deferred import TAIL, Deferred
from jaxinfer.models.params import abstract_params
from jaxinfer.models.stack import init_cache
from jaxinfer.runtime.backend import Backend
from jaxinfer.sparsity.base import Rule
from jaxinfer.testing import chains, trees
from jaxinfer.testing.decoding import assert_in_place
from jaxinfer.testing.stepper import Stepper
from tests.factories import CONFIGS, params_of, random_tokens
from tests.policies import full_bytes
from tests.sparsity.sparse_heads import sparse_lm, with_random_heads

ABOVE = Rule(threshold=0.0)  # about half of the groups, other ones for every token
slow, NAMES = pytest.mark.slow, ["full", "kivi"]
BLOCKS = kivi(bits=8, group=8, residual=32, value_flush="block")


def logits_of(model: str, policy: Policy, keys: str) -> np.ndarray:
    """64 tokens of two rows, read one by one."""
    stepper = Stepper(sparse_lm(model, ABOVE, keys=keys), policy)
    cache = stepper.cache(2)
    cache, found = stepper.run(cache, random_tokens(2, 64), (1,) * 64, width=1)
    assert isinstance(cache.policies[0], Deferred) == (keys == "deferred")
    return found


@pytest.mark.parametrize(
    "model, policy",  # "llama" has rotary positions and grouped queries, "learned" neither
    [
        pytest.param("llama", full(), id="rotary, grouped"),
        pytest.param("learned", BLOCKS, id="learned, KIVI"),
        pytest.param("learned", full(), id="learned", marks=slow),
        pytest.param("llama", BLOCKS, id="rotary, grouped, KIVI", marks=slow),
    ],
)
def test_deferred_keys_are_those_made_always(model, policy):
    """dejavu.md 6.4: 64 steps with other heads at every token, four flushes."""
    wanted = logits_of(model, policy, "always")
    found = logits_of(model, policy, "deferred")
    # a code of 8 bits may fall on the other side of a half
    tolerance = 2e-5 if policy.name == "full" else 1e-3
    np.testing.assert_allclose(found, wanted, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("policy", [full(), pytest.param(BLOCKS, marks=slow)], ids=NAMES)
def test_the_promises_of_the_policy_behind_are_kept(policy):
    """Trees of fresh tokens, chunks, ragged rows and growth, as with the policy alone."""
    lm = sparse_lm("llama", ABOVE, keys="deferred")
    trees.check_tree_paths(policy, lm)
    trees.check_tree_commit(policy, lm)
    trees.check_rejected_tree(policy, lm)
    chains.check_ragged_rows(policy, lm)
    chains.check_idle_rows(policy, lm)
    chains.check_chunks(policy, lm)
    if policy.name == "full":
        chains.check_growth(policy, lm)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_a_layer_keeps_the_inputs_of_sixteen_tokens_beside_its_cache(platform):
    lm = sparse_lm("llama", ABOVE, keys="deferred")
    width = lm.config.hidden_size

    def with_tail(policy: Policy, geometry: Geometry) -> int:
        return full_bytes(policy, geometry) + 16 * width * jnp.dtype(geometry.dtype).itemsize

    for dtype in ("float32", "bfloat16"):
        chains.check_bytes(full(), with_tail, lm, dtype=dtype, platform=platform)


def test_only_layers_that_defer_keep_inputs():
    cfg, dense = CONFIGS["llama"], params_of("llama")
    one = with_random_heads(cfg, dense, ABOVE, keys="deferred")["layers"][0]
    params = dense | {"layers": (one, dense["layers"][1])}
    cache = init_cache(cfg, params, per_layer([full(), streaming(4, 20)]), 1, 64)
    assert [type(policy) for policy in cache.policies] == [Deferred, Policy]
    assert [len(layer) for layer in cache.layers] == [2, 2]  # a tail and slots; sinks and a ring


@pytest.mark.parametrize("residual", [8, 16, 24, 32])
def test_the_horizon_ends_where_the_tiers_behind_change(residual):
    """KIVI's blocks are those of the tokens that have gone on, which is in runs of 16."""
    behind = kivi(bits=8, group=8, residual=residual, value_flush="block")
    policy = Deferred.of(CONFIGS["llama"], behind)
    for length in range(100):
        quantized = [(n // TAIL * TAIL) // residual for n in range(length, length + 100)]
        first = next(i for i, blocks in enumerate(quantized) if blocks > quantized[0])
        assert policy.horizon(jnp.asarray([length])).tolist() == [first]
    assert Deferred.of(CONFIGS["llama"], full()).horizon(jnp.asarray([5])) is None


def test_a_policy_that_weighs_keys_is_refused():
    lm = sparse_lm("llama", ABOVE, keys="deferred")
    with pytest.raises(ValueError, match="'h2o' looks at every key .* keys='always'"):
        lm.generate([[1, 2, 3]], policy=h2o(8, 8), max_new_tokens=4)
    always = sparse_lm("llama", ABOVE).params
    init_cache(CONFIGS["llama"], always, h2o(8, 8), 1, 64)


def decode_of(policy: Policy, platform: str, dtype: str = "float32"):
    """The decode loop of one layer with deferred heads over 16384 slots."""
    capacity = 16384
    cfg = replace(
        CONFIGS["llama"], num_layers=1, max_positions=4 * capacity, hidden_size=64, head_dim=16,
        num_heads=8, rope=replace(CONFIGS["llama"].rope, rotary_dim=16),
    )  # fmt: skip
    params = jax.eval_shape(
        lambda tree: with_random_heads(
            cfg, tree, ABOVE, keys="deferred", unions=(0.5,), backend=Backend.of(platform=platform)
        ),
        abstract_params(cfg, jnp.dtype(dtype)),
    )
    return decode_case(cfg, params, policy, capacity, 1, platform)


@pytest.mark.parametrize(
    "policy",
    [full(), pytest.param(kivi(bits=2, group=16, residual=16, value_flush="block"), marks=slow)],
    ids=NAMES,
)
def test_decoding_copies_no_cache(policy):
    case = decode_of(policy, "cpu")
    executable = case.program.prepare(*case.arguments).executable
    assert len(case.cache_leaves) >= 2
    assert_in_place(executable, case.cache_leaves, policy.name)


@pytest.mark.gpu_compile
@pytest.mark.skipif(not gpu_target.available(), reason=str(gpu_target.unavailable_reason()))
def test_a_step_with_listed_heads_compiles_for_an_h200_without_copies():
    """dejavu.md 6.6, and 6.11's gate without a GPU."""
    case = decode_of(full(), "gpu", "bfloat16")
    executable = gpu_target.compile_for(
        case.program, *case.arguments, compiler_options=gpu_target.SPILLS_ARE_ERRORS
    )
    text = executable.as_text()
    assert "sparse_heads" in text
    assert_in_place(executable, case.cache_leaves, "full")
    assert bytes_of(case.cache_leaves) > 0
