"""The speculative loop keeps the promises of the plain one: one trace, no cache copies, all leaves
in place, for the target's cache and the draft's."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from jaxinfer.cache.presets import full, kivi
from jaxinfer.decode.sampling import Sampler
from jaxinfer.inspection import gpu_target, hlo
from jaxinfer.inspection.decode_step import decode_case
from jaxinfer.models.params import abstract_params
from jaxinfer.speculative.drafters import ModelDrafter, ModelState
from jaxinfer.speculative.lookup import LookupDrafter, LookupState
from jaxinfer.speculative.step import TreeStep
from jaxinfer.speculative.topology import Topology
from tests.inspection.test_decode_structure import CFG, HUGE, needs_compiler

DRAFT = replace(CFG, num_layers=1)
REFERENCE = (0.77, 0.10, 0.04, 0.02, 0.013, 0.008)  # falls like the vector of appendix E
slow = pytest.mark.slow


def arguments(policy, tree, drafter, dtype, backend, temperature, batch=2):
    """(program, its arguments, the step, the cache leaves that count)."""
    sampler = Sampler(temperature=temperature)
    case, draft = (
        decode_case(cfg, abstract_params(cfg, jnp.dtype(dtype)), one, HUGE, batch, backend, sampler)
        for cfg, one in ((CFG, policy), (DRAFT, full()))
    )
    step = TreeStep(topology=tree, drafter=drafter)
    row = jax.ShapeDtypeStruct((batch,), jnp.int32)
    if isinstance(drafter, LookupDrafter):
        state = LookupState(jax.ShapeDtypeStruct((batch, HUGE), jnp.int32), row)
        leaves = case.cache_leaves
    else:
        state = ModelState(draft.state.cache, row)
        leaves = case.cache_leaves + draft.cache_leaves
    speculation = jax.eval_shape(lambda state: step.init_state(state, batch), state)
    params = case.engine.params | {"draft": draft.engine.params}
    cfg, _, requests, state, steps = case.arguments
    state = replace(state, speculation=speculation)
    return case.program, (cfg, params, requests, state, steps), step, leaves


def assert_structure(executable, leaves, tree, batch=2):
    assert hlo.cache_sized_copies(executable, leaves) == []
    assert hlo.unaliased_leaves(executable, leaves) == []
    logits = 4 * batch * tree.nodes * CFG.vocab_size
    scores = 4 * batch * tree.nodes * CFG.num_heads * HUGE
    assert hlo.memory(executable).temp_bytes <= 4 * logits + 3 * scores + (1 << 20)


@pytest.mark.parametrize(
    "policy, drafter, temperature",
    [
        (full(), ModelDrafter(cfg=DRAFT), 0.7),
        pytest.param(full(), ModelDrafter(cfg=DRAFT), 0.0, marks=slow),
        pytest.param(full(), LookupDrafter(), 0.0, marks=slow),
        pytest.param(
            kivi(bits=2, group=16, residual=16, value_flush="block"), ModelDrafter(cfg=DRAFT), 0.7,
            marks=slow,
        ),
    ],
)  # fmt: skip
def test_a_tree_step_on_the_cpu_copies_no_cache(policy, drafter, temperature):
    tree = Topology.chain(4)
    if isinstance(drafter, ModelDrafter):
        tree = Topology.optimal(REFERENCE, 8, 3)
    program, args, step, leaves = arguments(policy, tree, drafter, "float32", "cpu", temperature)
    executable = program.prepare(*args, step=step).executable
    assert_structure(executable, leaves, tree)
    assert program.traces == 1


@pytest.mark.gpu_compile
@needs_compiler
@pytest.mark.parametrize(
    "nodes, levels", [pytest.param(64, 6, marks=slow), pytest.param(128, 6, marks=slow), (16, 3)]
)
def test_a_tree_step_on_an_h200_copies_no_cache(nodes, levels):
    tree = Topology.optimal(REFERENCE, nodes, levels)
    program, args, step, leaves = arguments(
        full(), tree, ModelDrafter(cfg=DRAFT), "bfloat16", "gpu", 0.7
    )
    executable = gpu_target.compile_for(
        program, *args, step=step, compiler_options=gpu_target.SPILLS_ARE_ERRORS
    )
    assert_structure(executable, leaves, tree)
