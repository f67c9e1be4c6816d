"""Cache copies, aliases and fusions are read correctly from the text of compiled programs."""

import jax
import jax.numpy as jnp
import pytest
from toy import attend, cache_leaves, compiled, loop, other_arguments

from jaxinfer.inspection.hlo import (
    aliased_leaves,
    cache_sized_copies,
    fusion_count,
    memory,
    unaliased_leaves,
)
from jaxinfer.inspection.hlo_text import parse, parse_types

CACHE = cache_leaves()
REST = other_arguments()


def test_reading_then_writing_behind_the_token_copies_nothing():
    program = compiled(loop("guarded"), CACHE, *REST)
    assert cache_sized_copies(program, CACHE) == []
    assert unaliased_leaves(program, CACHE) == []


def test_reading_then_writing_without_a_guard_copies_the_cache():
    found = cache_sized_copies(compiled(loop("unguarded"), CACHE, *REST), CACHE)
    assert len(found) >= 2 and all(line.startswith("copy f32[2,2,") for line in found)


def test_writing_before_two_reads_of_old_and_new_state_copies_the_cache():
    # Writing first is free only while nothing reads the old cache afterwards.
    def step(cache, query, steps):
        new = (cache[0].at[:, :, :, steps].set(query), cache[1].at[:, :, steps].set(query))
        live = jnp.full((2,), 9)
        return new, attend(query, *new, live) + attend(query, *cache, live)

    assert cache_sized_copies(compiled(step, CACHE, *REST), CACHE)


def test_a_program_that_does_not_own_its_cache_copies_it_once_per_leaf():
    program = compiled(loop("guarded"), CACHE, *REST, donate=())
    assert len(cache_sized_copies(program, CACHE)) == 2
    assert len(unaliased_leaves(program, CACHE)) == 2
    assert memory(program).alias_bytes == 0


@pytest.mark.parametrize(
    "name, change",
    [
        ("convert", lambda x: x.astype(jnp.bfloat16)),
        ("transpose", lambda x: jnp.swapaxes(x, 2, 3)),
        ("half slice", lambda x: x[:, :, : x.shape[2] // 2]),
        ("select", lambda x: jnp.where(x[:, :, :1, :1] > 0, x, 0)),
        ("scale", lambda x: 2 * x + 1),
        ("repeat", lambda x: jnp.repeat(x, 3, axis=1)),
        ("concatenate", lambda x: jnp.concatenate([x, x[:, :, :1]], axis=2)),
        ("pad", lambda x: jnp.pad(x, [(0, 0), (0, 0), (0, 7), (0, 0)])),
        ("halves one by one", lambda x: jax.lax.map(lambda row: row.T, x.reshape(2, -1, 16))),
        ("64 parts one by one", lambda x: jax.lax.map(lambda row: row.T, x.reshape(64, -1, 16))),
    ],
)
def test_whatever_makes_another_cache_out_of_a_cache_is_counted(name, change):
    def program(values):
        return change(values)

    assert cache_sized_copies(compiled(program, CACHE[1], donate=()), [CACHE[1]]), name


def test_small_reads_and_contractions_are_not_counted():
    def program(values, query):
        one_slot = jax.lax.dynamic_slice_in_dim(values, 3, 1, 2)
        quarter = values[:, :, : values.shape[2] // 4]
        return jnp.tanh(jnp.einsum("bksh,bkh->bks", values, query)), one_slot, quarter

    assert cache_sized_copies(compiled(program, CACHE[1], REST[0], donate=()), [CACHE[1]]) == []


def test_blocks_of_a_read_are_not_counted_but_what_is_made_of_them_is():
    def reading(values, query):
        def body(i, acc):
            block = jax.lax.dynamic_slice_in_dim(values, i * 512, 512, 2)
            return acc + jnp.einsum("bksh,bkh->bk", jnp.tanh(block) * 2, query)

        return jax.lax.fori_loop(0, query.shape[0], body, jnp.zeros(query.shape[:2]))

    def copying(values):
        def body(i, made):
            block = jax.lax.dynamic_slice_in_dim(values, i * 512, 512, 2)
            return jax.lax.dynamic_update_slice_in_dim(made, jnp.tanh(block), i * 512, 2)

        return jax.lax.fori_loop(0, 2, body, jnp.zeros(values.shape))

    assert cache_sized_copies(compiled(reading, CACHE[1], REST[0], donate=()), [CACHE[1]]) == []
    assert cache_sized_copies(compiled(copying, CACHE[1], donate=()), [CACHE[1]])


def test_large_activations_that_do_not_come_from_the_cache_are_not_counted():
    def program(values, logits):
        return values.at[0, 0, 0, 0].set(1.0), jax.nn.softmax(logits)

    logits = jax.ShapeDtypeStruct((4, 1 << 16), jnp.float32)
    assert cache_sized_copies(compiled(program, CACHE[1], logits), [CACHE[1]]) == []


def test_a_second_cache_made_from_nothing_is_counted():
    def program(values, index):
        scratch = jnp.zeros(values.shape, values.dtype).at[0, 0, index].set(1.0)
        return values + 0 * scratch.sum(), scratch

    found = cache_sized_copies(compiled(program, CACHE[1], REST[1]), [CACHE[1]])
    assert any("broadcast" in line for line in found)


def test_leaves_can_be_given_as_bytes():
    program = compiled(loop("unguarded"), CACHE, *REST)
    size = 2 * 2 * 16 * 1024 * 4
    assert cache_sized_copies(program, [size]) == cache_sized_copies(program, CACHE)


def test_leaves_that_the_program_does_not_have_are_an_error():
    program = compiled(loop("guarded"), CACHE, *REST)
    with pytest.raises(ValueError, match="looks like a cache leaf"):
        cache_sized_copies(program, [jax.ShapeDtypeStruct((3, 3), jnp.float32)])


def test_donated_arguments_are_listed_with_the_output_that_reuses_them():
    program = compiled(loop("guarded"), CACHE, *REST)
    assert aliased_leaves(program) == {0: (3,), 1: (4,)}
    assert memory(program).alias_bytes == 2 * 2 * 2 * 16 * 1024 * 4


def test_fusions_are_counted_once_and_not_inside_each_other():
    assert fusion_count(compiled(lambda x: jnp.sin(x) * 2 + 1, REST[0], donate=())) == 1


def test_types_keep_dtype_dimensions_and_bytes():
    (first, second) = parse_types("(bf16[2,3]{1,0:T(8,128)}, /*index=1*/s4[10]{0})")
    assert (first.dtype, first.dims, first.bytes) == ("bf16", (2, 3), 12)
    assert second.bytes == 5
    assert [t.bytes for t in parse_types("(f8e4m3fn[4], pred[3], u16[], token[])")] == [4, 3, 2, 0]


def test_a_text_without_a_module_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        cache_sized_copies("nothing here", [8])


def test_an_aliased_custom_call_writes_in_place_and_another_one_does_not():
    text = """HloModule m, input_output_alias={ {}: (0, {}, may-alias) }

ENTRY %main (p: f32[64]) -> f32[64] {
  %p = f32[64]{0} parameter(0)
  ROOT %c = f32[64]{0} custom-call(%p), custom_call_target="kernel"ALIAS
}
"""
    alias = ", output_to_operand_aliasing={{}: (0, {})}"
    assert len(cache_sized_copies(text.replace("ALIAS", ""), [256])) == 1
    assert cache_sized_copies(text.replace("ALIAS", alias), [256]) == []
    assert parse(text).aliases == {0: ()}
