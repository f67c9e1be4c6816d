"""Decode steps of long convolutions, compiled for an H200 without one: distilled, beside attention,
and exact.

A recurrence's state is small and of constant size; XLA copies the real part once, as both parts are
made of both. What grows with the text, keys, values and stored inputs, is never copied outside the
branches that transform it.
"""

from dataclasses import replace

import jax.numpy as jnp
import pytest

from jaxinfer.cache.presets import full
from jaxinfer.config import ModelConfig, RopeConfig
from jaxinfer.hyena_config import FilterConfig, HyenaConfig
from jaxinfer.inspection import gpu_target, hlo
from jaxinfer.inspection.decode_step import decode_case
from jaxinfer.models.params import abstract_params
from tools.kernels.inspect_steps import row_of

CAPACITY = 4096
MODAL = ModelConfig(
    family="hyena", vocab_size=512, hidden_size=64, intermediate_size=128, num_layers=2,
    num_heads=8, num_kv_heads=2, head_dim=16, max_positions=CAPACITY, positions="none",
    mixers=("hyena", "hyena"),
    hyena=HyenaConfig(filter=FilterConfig(kind="explicit"), modes=(16, 16)),
)  # fmt: skip
HYBRID = replace(
    MODAL, positions="rope", rope=RopeConfig(rotary_dim=16), mixers=("hyena", "attn"),
    hyena=replace(MODAL.hyena, head_size=4, modes=(16, 0)),
)  # fmt: skip
FORMS = {"modal": MODAL, "multihyena beside attention": HYBRID}
FORMS |= {
    form: replace(MODAL, hyena=replace(MODAL.hyena, modes=None, exact=form))
    for form in ("cached", "tiled", "epoched")
}
SLOW = [pytest.param(form, marks=pytest.mark.slow) for form in ("tiled", "epoched")]
pytestmark = [
    pytest.mark.gpu_compile,
    pytest.mark.skipif(
        not gpu_target.available(), reason=str(gpu_target.unavailable_reason())
    ),
]  # fmt: skip


def step_of(name: str):
    params = abstract_params(FORMS[name], jnp.bfloat16)
    case = decode_case(FORMS[name], params, full(), CAPACITY, 2, "gpu")
    executable = gpu_target.compile_for(
        case.program, *case.arguments, compiler_options=gpu_target.SPILLS_ARE_ERRORS
    )
    assert not hlo.unaliased_leaves(hlo.module_of(executable), case.cache_leaves)
    return case, executable


@pytest.mark.parametrize("name", ["modal", "multihyena beside attention"])
def test_a_recurrence_on_an_h200_copies_its_state_of_constant_size_alone(name):
    case, executable = step_of(name)
    copies = hlo.cache_sized_copies(hlo.module_of(executable), case.cache_leaves)
    parts = {
        str(copy).rpartition(" of state.cache.layers")[2].rpartition(".")[2] for copy in copies
    }
    assert parts <= {"re", "im", "short"}, copies
    assert hlo.memory(executable).temp_bytes < 1 << 18  # measured: 54 and 151 KB
    assert hlo.fusion_count(executable) <= 30  # measured: 21 and 26
    if name == "modal":  # of 4,096 positions nothing is left
        assert max(size for leaf in case.cache_leaves for size in leaf.shape) == 192


@pytest.mark.parametrize("name", ["cached", *SLOW])
def test_exact_decoding_on_an_h200_writes_its_inputs_in_place(name):
    """Also what is summed ahead; the transforms' temporaries are theirs."""
    case, executable = step_of(name)
    rows, width = 2, MODAL.hidden_size
    inputs = 4 * rows * CAPACITY * width
    assert hlo.memory(executable).alias_bytes >= rows * CAPACITY * width * 2
    most = {"cached": 3, "tiled": 20, "epoched": 10}[name]  # measured: 2, 16 and 8
    assert hlo.memory(executable).temp_bytes < most * inputs
    assert len(case.cache_leaves) == (4 if name == "tiled" else 2)


@pytest.mark.slow
def test_a_layer_of_hyena_1_3b_takes_few_launches_on_an_h200():
    row = row_of("hyena-1.3b", "full", "bfloat16", batch=1, target="h200")
    assert row["launches_per_layer"] <= 14 and row["unaliased_leaves"] == 0
