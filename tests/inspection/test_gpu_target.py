"""The GPU compiler runs on this machine and its programs can be read."""

import jax
import jax.numpy as jnp
import pytest
from toy import cache_leaves, loop, other_arguments

from jaxinfer.inspection import gpu_target
from jaxinfer.inspection.hlo import aliased_leaves, cache_sized_copies, fusion_count, memory
from jaxinfer.runtime.program import Program

needs_compiler = pytest.mark.skipif(
    not gpu_target.available(), reason=str(gpu_target.unavailable_reason())
)


def test_lowering_for_cuda_needs_no_plugin():
    lowered = gpu_target.lower_for_cuda(jnp.sin, jax.ShapeDtypeStruct((8,), jnp.float32))
    assert "stablehlo.sine" in lowered.as_text()


def test_the_described_devices_have_names():
    assert "h200" in gpu_target.target_names()


@pytest.mark.gpu_compile
@needs_compiler
@pytest.mark.parametrize("transposed", [True, False])
def test_a_decode_loop_over_64k_slots_copies_nothing_on_an_h200(transposed):
    sizes = dict(batch=2, kv_heads=4, width=128)
    cache = cache_leaves(**sizes, slots=65536, dtype=jnp.bfloat16, transposed=transposed)
    program = gpu_target.compile_for(
        loop("guarded", transposed),
        cache,
        *other_arguments(**sizes, dtype=jnp.bfloat16),
        donate_argnames=("cache",),
        compiler_options=gpu_target.SPILLS_ARE_ERRORS,
    )
    assert cache_sized_copies(program, cache) == []
    assert sorted(aliased_leaves(program)) == [0, 1]
    assert memory(program).temp_bytes < 16 << 20
    assert 0 < fusion_count(program) < 60


@pytest.mark.gpu_compile
@needs_compiler
def test_a_program_brings_its_static_arguments_and_still_runs_here():
    program = Program(lambda x, times: x * times, static_argnames=("times",))
    x = jnp.ones((4, 4))
    assert "HloModule" in gpu_target.compile_for(program, x, 3).as_text()
    assert program(x, 3).sum() == 48 and program.traces == 1


@pytest.mark.gpu_compile
@needs_compiler
def test_an_unknown_device_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="abacus.*h200"):
        gpu_target.compile_for(jnp.sin, jnp.ones(3), target="abacus")


def test_without_the_plugin_the_reason_names_the_command(monkeypatch):
    monkeypatch.setattr(gpu_target, "_PLUGINS", ("jax_plugins.absent",))
    gpu_target.unavailable_reason.cache_clear()
    try:
        assert "pip install --no-deps jax-cuda13-pjrt==" in gpu_target.unavailable_reason()
        with pytest.raises(ValueError, match="pip install"):
            gpu_target.compile_for(jnp.sin, jnp.ones(3))
    finally:
        gpu_target.unavailable_reason.cache_clear()


@pytest.mark.gpu_compile
@needs_compiler
def test_programs_for_other_devices_are_not_stored_in_the_compilation_cache(recwarn):
    leaf = jax.ShapeDtypeStruct((1237,), jnp.float32)  # a size that nothing else compiles
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    for _ in range(2):
        gpu_target.compile_for(jnp.cosh, leaf)
    assert [w for w in recwarn if "compilation cache" in str(w.message)] == []
    assert jax.config.jax_persistent_cache_min_compile_time_secs == before
