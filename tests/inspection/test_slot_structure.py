"""A row enters and leaves a running state in place: no program copies what the slots hold."""

import jax
import jax.numpy as jnp
import pytest

from jaxinfer.cache.presets import full, kivi
from jaxinfer.decode.engine import Engine
from jaxinfer.decode.slots import Row, slot_programs
from jaxinfer.inspection.decode_step import decode_case
from jaxinfer.models.params import abstract_params
from jaxinfer.testing.decoding import assert_in_place
from jaxinfer.testing.models import BASE

SLOT = jax.ShapeDtypeStruct((), jnp.int32)
POLICIES = {"full": full(), "kivi": kivi(bits=4, group=8, residual=16)}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_rows_enter_and_leave_without_a_copy_of_the_cache(policy):
    params = abstract_params(BASE)
    cases = {rows: decode_case(BASE, params, policy, 16384, rows, "cpu") for rows in (4, 1)}
    programs = slot_programs(Engine(BASE, params))
    case, one = cases[4], Row(cases[1].state, cases[1].requests)
    insert = programs["insert"].prepare(case.state, case.requests, one, SLOT)
    free = programs["free"].prepare(case.state, SLOT)
    assert len(case.cache_leaves) >= 2
    for name, compiled in (("insert", insert), ("free", free)):
        assert_in_place(compiled.executable, case.cache_leaves, name)
