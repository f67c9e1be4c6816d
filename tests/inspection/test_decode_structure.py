"""The real decode loop keeps its promises: no cache copies, every leaf in place, small temporaries.

The model is a random Llama of two layers. Compiling takes seconds, so that one case per axis value
is fast and the other combinations are marked slow.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from jaxinfer.cache.base import bytes_of
from jaxinfer.cache.presets import full, h2o, kivi, streaming
from jaxinfer.config import ModelConfig, RopeConfig
from jaxinfer.inspection import gpu_target, hlo
from jaxinfer.inspection.decode_step import decode_case, inspect_decode, step_bytes
from jaxinfer.models.params import abstract_params, count_params, init_params
from jaxinfer.runtime.backend import Backend
from jaxinfer.testing.decoding import assert_in_place
from tests.models.hyena_models import MODES, MULTI
from tests.policies import over, with_random_feature_maps
from tools.kernels.inspect_steps import SPARSE, row_of

CFG = ModelConfig(
    family="llama",
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=8,
    num_kv_heads=2,
    head_dim=16,
    max_positions=32768,
    rope=RopeConfig(rotary_dim=16),
)
# Another layer would be compiled the same way; the dense cache has two above.
ONE_LAYER = replace(CFG, num_layers=1)
SMALL, LARGE = 512, 16384
slow = pytest.mark.slow
needs_compiler = pytest.mark.skipif(
    not gpu_target.available(), reason=str(gpu_target.unavailable_reason())
)


def assert_structure(case, executable, batch, capacity, backend):
    leaves = case.cache_leaves
    assert len(leaves) >= 2
    assert_in_place(executable, leaves, "the policy")
    memory = hlo.memory(executable)
    assert memory.alias_bytes >= bytes_of(case.state.cache)
    block = Backend.of(platform=backend).block or capacity
    bound = 4 * batch * (CFG.vocab_size + 3 * CFG.num_heads * block) + (5 << 18)  # and weights
    assert memory.temp_bytes <= bound


@pytest.mark.parametrize(
    "dtype, batch, capacity",
    [
        ("float32", 1, SMALL),
        ("float32", 4, LARGE),
        ("bfloat16", 1, LARGE),
        ("bfloat16", 4, SMALL),
        pytest.param("float32", 4, SMALL, marks=slow),
        pytest.param("float32", 1, LARGE, marks=slow),
        pytest.param("bfloat16", 4, LARGE, marks=slow),
        pytest.param("bfloat16", 1, SMALL, marks=slow),
    ],
)
def test_decoding_on_the_cpu_copies_no_cache(dtype, batch, capacity):
    params = abstract_params(CFG, jnp.dtype(dtype))
    case = decode_case(CFG, params, full(), capacity, batch, "cpu")
    executable = case.program.prepare(*case.arguments).executable
    assert_structure(case, executable, batch, capacity, "cpu")


@pytest.mark.gpu_compile
@needs_compiler
@pytest.mark.parametrize(
    "dtype, batch, capacity",
    [
        ("bfloat16", 1, LARGE),
        ("bfloat16", 4, SMALL),
        pytest.param("float32", 4, LARGE, marks=slow),
        pytest.param("float32", 1, SMALL, marks=slow),
        pytest.param("bfloat16", 4, LARGE, marks=slow),
        pytest.param("bfloat16", 1, SMALL, marks=slow),
    ],
)
def test_decoding_on_an_h200_copies_no_cache(dtype, batch, capacity):
    params = abstract_params(CFG, jnp.dtype(dtype))
    case = decode_case(CFG, params, full(), capacity, batch, "gpu")
    executable = gpu_target.compile_for(
        case.program, *case.arguments, compiler_options=gpu_target.SPILLS_ARE_ERRORS
    )
    assert_structure(case, executable, batch, capacity, "gpu")
    assert hlo.fusion_count(executable) <= 40 * CFG.num_layers  # measured: 50 to 67 for two layers


@pytest.mark.gpu_compile
@needs_compiler
@pytest.mark.parametrize(
    "model, policy, weights, most",
    [
        ("llama-2-7b", "full", "bfloat16", 10),
        ("llama-2-7b", "kivi", "bfloat16", 12),
        pytest.param("llama-2-7b", "full", "int4", 15, marks=slow),
        pytest.param("smollm2-135m", "full", "bfloat16", 10, marks=slow),
    ],
)
def test_a_layer_takes_few_launches_on_an_h200(model, policy, weights, most):
    row = row_of(model, policy, weights, batch=1, target="h200")
    assert row["launches_per_layer"] <= most
    assert row["cache_copies"] == row["unaliased_leaves"] == 0


@pytest.mark.gpu_compile
@needs_compiler
@pytest.mark.parametrize("policy, weights", [("h2o", "bfloat16"), ("full", SPARSE)])
def test_no_step_of_one_row_copies_its_cache_on_an_h200(policy, weights):
    row = row_of("smollm2-135m", policy, weights, batch=1, target="h200")
    assert row["cache_copies"] == row["unaliased_leaves"] == 0


def less(base, cfg=ONE_LAYER):
    return with_random_feature_maps(over(base), cfg)


# Sizes at which a block of a read is no half of a leaf with keys, values, codes or scales, and the
# sinks' and tails' own leaves are too small to count.
POLICIES = {
    "streaming": streaming(sinks=4, window=1020),
    "h2o": h2o(heavy=512, recent=600),
    "kivi": kivi(bits=2, group=16, residual=16),
    "kivi by blocks": kivi(bits=2, group=16, residual=16, value_flush="block"),
    "less over h2o": less(h2o(heavy=512, recent=600)),
    "less over streaming": less(streaming(sinks=4, window=1020)),
    "less over sinks and kivi": less(streaming(4, 32768, bits=2, group=16, residual=16)),
}
HUGE = 65536


def case_of(name: str, dtype: str, backend: str):
    params = abstract_params(ONE_LAYER, jnp.dtype(dtype))
    return decode_case(ONE_LAYER, params, POLICIES[name], HUGE, 2, backend)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=slow)])
@pytest.mark.parametrize("name", POLICIES)
def test_no_policy_copies_its_cache_on_the_cpu(name, dtype):
    case = case_of(name, dtype, "cpu")
    assert_structure(case, case.program.prepare(*case.arguments).executable, 2, 2048, "cpu")


def test_what_a_hyena_layer_keeps_is_counted():
    """Stored inputs of three axes, and states of modes where nothing grows."""
    stored = decode_case(MULTI, abstract_params(MULTI), full(), SMALL, 1, "cpu").cache_leaves
    assert (1, SMALL, 2 * MULTI.hidden_size) in [leaf.shape for leaf in stored]
    assert len(stored) == 3  # and keys and values of the attention
    modal = decode_case(MODES, abstract_params(MODES), full(), SMALL, 1, "cpu").cache_leaves
    assert [leaf.shape for leaf in modal] == 2 * [(1, 2, 96), *2 * [(1, 32, 1, 4)]]


def test_one_row_of_kivi_is_written_in_place():
    """Of a single row and block XLA makes an update instead of a scatter."""
    params = abstract_params(ONE_LAYER)
    policy = kivi(bits=2, group=16, residual=128, value_flush="block")
    case = decode_case(ONE_LAYER, params, policy, HUGE, 1, "cpu")
    leaves = case.cache_leaves
    assert len(leaves) == 6  # codes, scales and zeros of both halves; the tail does not grow
    assert_in_place(case.program.prepare(*case.arguments).executable, leaves, "kivi")


@pytest.mark.gpu_compile
@needs_compiler
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=slow)])
@pytest.mark.parametrize(
    "name",
    [  # "less over sinks and kivi" has the segments of these two
        pytest.param(name, marks=slow) if name in ("streaming", "kivi by blocks") else name
        for name in POLICIES
    ],
)
def test_no_policy_copies_its_cache_on_an_h200(name, dtype):
    case = case_of(name, dtype, "gpu")
    executable = gpu_target.compile_for(
        case.program, *case.arguments, compiler_options=gpu_target.SPILLS_ARE_ERRORS
    )
    assert_structure(case, executable, 2, HUGE, "gpu")
    assert hlo.fusion_count(executable) <= 90  # measured: 86 at most


@pytest.fixture(scope="module")
def inspected():
    return inspect_decode(CFG, init_params(CFG, jax.random.key(0)), full(), SMALL, batch=2)


def test_inspection_counts_parameters_and_cache_bytes(inspected):
    assert inspected["parameters"] == count_params(CFG)
    assert inspected["parameter_bytes"] == 4 * count_params(CFG)
    assert inspected["cache_bytes_per_token"] == 2 * 2 * 16 * 4 * CFG.num_layers
    assert inspected["cache_bytes"] == 2 * SMALL * inspected["cache_bytes_per_token"]


def test_inspection_runs_some_steps_against_the_floor(inspected):
    decode = inspected["decode"]
    assert decode["traces"] == 1 and decode["cache_copies"] == 0
    assert decode["step_ms"] > 0 and decode["floor_ms"] > 0
    assert decode["floor_share"] == pytest.approx(decode["floor_ms"] / decode["step_ms"])


@pytest.mark.gpu_compile
@needs_compiler
def test_inspection_for_another_device_runs_nothing():
    facts = inspect_decode(CFG, abstract_params(CFG), full(), SMALL, batch=2, target="h200")
    assert facts["parameter_bytes"] == 2 * count_params(CFG)
    assert facts["decode"]["cache_copies"] == 0 and facts["decode"]["fusions"] > 0
    assert facts["decode"]["step_ms"] is None and facts["decode"]["floor_share"] is None


def test_a_step_reads_all_weights_but_an_untied_embedding():
    params = abstract_params(CFG)
    assert step_bytes(CFG, params) == 4 * (count_params(CFG) - 512 * 64)
    assert step_bytes(CFG, params, 100) == step_bytes(CFG, params) + 100
