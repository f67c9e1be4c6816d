"""A Program compiles once per signature, counts it, and runs what jit would run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.runtime.program import Program


def scaled_sum(scale, tree, offset, *, mode="sum"):
    total = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(tree))
    return scale * total + offset if mode == "sum" else total


@pytest.fixture
def program():
    return Program(scaled_sum, static_argnames=("scale", "mode"))


def test_equal_signatures_compile_once(program):
    for offset in range(3):
        assert program(2, {"a": jnp.ones(3)}, jnp.int32(offset)) == 6 + offset
    assert program.traces == 1 and len(program) == 1


def test_a_new_shape_dtype_or_static_value_compiles_again(program):
    program(2, {"a": jnp.ones(3)}, jnp.int32(0))
    program(2, {"a": jnp.ones(4)}, jnp.int32(0))
    program(2, {"a": jnp.ones(3, jnp.bfloat16)}, jnp.int32(0))
    program(3, {"a": jnp.ones(3)}, jnp.int32(0))
    program(2, {"a": jnp.ones(3)}, jnp.int32(0), mode="plain")
    assert len(program) == 5


def test_weak_types_are_part_of_the_signature(program):
    program(2, {"a": jnp.ones(3)}, jnp.float32(1))
    program(2, {"a": jnp.ones(3)}, 1.0)
    assert len(program) == 2


def test_static_arguments_may_be_given_by_place_name_or_default(program):
    tree = {"a": jnp.ones(3)}
    program(2, tree, jnp.int32(0))
    program(2, tree, jnp.int32(0), mode="sum")
    program(scale=2, tree=tree, offset=jnp.int32(0))  # other argument tree, as in jit
    program(tree=tree, offset=jnp.int32(0), scale=2, mode="sum")
    assert len(program) == 2


def test_prepare_with_abstract_leaves_serves_real_arrays(program):
    abstract = {"a": jax.ShapeDtypeStruct((3,), jnp.float32)}
    compiled = program.prepare(2, abstract, jax.ShapeDtypeStruct((), jnp.int32))
    assert compiled.trace_s > 0 and compiled.compile_s > 0
    assert program(2, {"a": jnp.ones(3)}, jnp.int32(1)) == 7
    assert program(2, {"a": np.ones(3, np.float32)}, np.int32(1)) == 7
    assert program.traces == 1


def test_compile_seconds_are_zero_on_a_hit_and_summed_on_misses(program):
    program(2, {"a": jnp.ones(3)}, jnp.int32(0))
    first = program.last_compile_s
    program(2, {"a": jnp.ones(3)}, jnp.int32(0))
    assert program.last_compile_s == 0.0
    program(2, {"a": jnp.ones(5)}, jnp.int32(0))
    assert program.compile_s == pytest.approx(first + program.last_compile_s)


def test_donated_arguments_are_consumed():
    program = Program(lambda state, x: state.at[0].set(x), donate_argnames=("state",))
    state = jnp.zeros(1024)
    pointer = state.unsafe_buffer_pointer()
    result = program(state, jnp.float32(3))
    assert state.is_deleted() and result.unsafe_buffer_pointer() == pointer


def test_unhashable_static_values_are_refused_with_their_names(program):
    with pytest.raises(ValueError, match="scale.*must be hashable"):
        program([2], {"a": jnp.ones(3)}, jnp.int32(0))


def test_unknown_argument_names_are_refused():
    with pytest.raises(ValueError, match="width"):
        Program(lambda x: x, static_argnames=("width",))


def test_clear_forgets_the_executables(program):
    program(2, {"a": jnp.ones(3)}, jnp.int32(0))
    program.clear()
    program(2, {"a": jnp.ones(3)}, jnp.int32(0))
    assert program.traces == 2
