"""Which form a step of a sparse block takes, and what it then reads."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfer as ji
from jaxinfer.cache.base import bytes_of
from jaxinfer.inspection.break_even import break_even, crossing
from jaxinfer.inspection.decode_step import inspect_decode, step_bytes
from jaxinfer.inspection.roofline import dots_only, products
from jaxinfer.nn.block_mlp import union_list
from jaxinfer.nn.mlp import FeedForward
from jaxinfer.runtime.backend import Backend
from jaxinfer.sparsity.base import Rule, Static
from jaxinfer.sparsity.mlp import CPU_LARGE_PAYS, CPU_PAYS, GPU_PAYS, SparseMlp
from tests.factories import CONFIGS, params_of
from tests.sparsity.blocks import RANK, SIZE, dense_block, router, sparse, with_sparse_blocks

CPU, GPU = Backend.of("reference"), Backend.of("interpret")
LLAMA, PLAIN = CONFIGS["llama"], replace(CONFIGS["learned"], mlp_bias=True)
BLOCKS = LLAMA.intermediate_size // SIZE


@pytest.fixture(autouse=True)
def lists_small_blocks(monkeypatch):
    monkeypatch.setattr("jaxinfer.sparsity.mlp.SMALLEST_BLOCK", 1)


def test_expected_unions_grow_with_the_rows():
    """Measured ones up to the last, then as of independent tokens (dejavu.md 5.5)."""
    measured = (0.125, 0.2, 0.25)
    block = sparse(LLAMA, dense_block(LLAMA), 0.25, unions=measured)
    assert [block.union(rows) for rows in (1, 2, 3, 4)] == [0.125, 0.2, 0.25, 0.25]
    assert block.union(8) == pytest.approx(1 - 0.75**2)
    assert block.union(6) == pytest.approx(1 - 0.75**1.5)
    free = sparse(LLAMA, dense_block(LLAMA), 0.25)
    assert free.union(1) == 0.25 and free.union(3) == pytest.approx(1 - 0.75**3)
    for one in (block, free):
        found = [one.union(rows) for rows in range(1, 200)]
        assert found == sorted(found) and found[-1] <= 1


@pytest.mark.parametrize("unions", [(0.3, 0.2), (-0.1,), (0.5, 1.5), (float("nan"),)])
def test_unions_that_fall_or_are_no_shares_are_refused(unions):
    with pytest.raises(ValueError, match="shares from 0 to 1 that do not fall"):
        sparse(LLAMA, dense_block(LLAMA), 0.25, unions=unions)


def test_a_list_is_taken_where_the_union_is_small():
    block = sparse(LLAMA, dense_block(LLAMA), 0.25)
    wanted = {rows: 1 - 0.75**rows for rows in (1, 2, 4, 8, 64)}
    for backend, most in ((CPU, CPU_PAYS), (GPU, GPU_PAYS)):
        assert {r: block.lists(r, backend) for r in wanted} == {
            r: union < most for r, union in wanted.items()
        }
    assert not block.lists(8, CPU) and not block.lists(64, GPU)  # batches and trees: all
    overlapping = replace(block, unions=(0.25, 0.27, 0.3, 0.32))
    assert overlapping.lists(8, CPU)
    assert not block.lists(1, None)  # training


def test_a_block_that_no_cache_holds_is_listed_below_a_smaller_share(monkeypatch):
    block = sparse(LLAMA, dense_block(LLAMA), 0.25)
    assert block.pays_below(CPU) == CPU_PAYS > CPU_LARGE_PAYS
    monkeypatch.setattr("jaxinfer.sparsity.mlp.CACHED_BYTES", bytes_of(block.weights))
    assert block.pays_below(CPU) == CPU_LARGE_PAYS and block.pays_below(GPU) == GPU_PAYS


def test_single_neurons_are_never_listed_on_a_cpu(monkeypatch):
    monkeypatch.undo()
    assert not sparse(LLAMA, dense_block(LLAMA), 0.1).lists(1, CPU)
    assert sparse(LLAMA, dense_block(LLAMA), 0.1).lists(1, GPU)


def test_a_threshold_without_measured_unions_reads_all():
    block = SparseMlp.of(dense_block(LLAMA), router(LLAMA, Rule(threshold=0.0)))
    assert block.union(1) == 1 and not block.lists(1, GPU)


@pytest.mark.parametrize("rule", [Rule(most=5), Rule(most=5, threshold=0.3), Rule(most=99)])
def test_the_list_of_one_row_is_what_its_mask_says(rule):
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(1, BLOCKS)), jnp.float32)
    blocks, count, own = rule.listed(scores)
    assert sorted(blocks[:count].tolist()) == np.flatnonzero(rule(scores)[0]).tolist()
    assert own is None


def test_the_list_of_several_rows_holds_what_any_selected():
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(3, BLOCKS)), jnp.float32)
    mask = Rule(most=2)(scores)
    blocks, count, own = union_list(mask)
    assert blocks[:count].tolist() == np.flatnonzero(mask.any(axis=0)).tolist()
    assert own is not None and np.array_equal(own[:, :count], mask[:, blocks[:count]])


def by_hand(cfg, share: float, gated: bool, biased: bool) -> int:
    """Bytes of a block in float32: the shared neurons' rows, the router, the output's bias."""
    d, f = cfg.hidden_size, cfg.intermediate_size
    neuron = (2 + gated) * d + (1 + gated) * biased
    return 4 * round(share * f * neuron + RANK * d + RANK * f // SIZE + d * biased)


@pytest.mark.parametrize("cfg, gated, biased", [(LLAMA, True, False), (PLAIN, False, True)])
@pytest.mark.parametrize("share, rows", [(0.25, 1), (0.4375, 2), (1.0, 8)])
def test_bytes_are_those_of_the_slices_that_are_read(cfg, gated, biased, share, rows):
    """dejavu.md 6.10"""
    block = sparse(cfg, dense_block(cfg), 0.25)
    assert block.read_bytes(rows, CPU) == by_hand(cfg, share, gated, biased)


def test_a_step_reads_what_its_blocks_read():
    """dejavu.md 6.10: attention, norms and head in full."""
    cfg, params = LLAMA, params_of("llama")
    small = with_sparse_blocks(cfg, params, 0.25, first=1)
    first, second = params["layers"]
    rest = bytes_of((first, second["attn"], second["attn_norm"], second["mlp_norm"]))
    rest += bytes_of((params["final_norm"], params["head"]))
    assert step_bytes(cfg, small, 7, 1, CPU) == rest + by_hand(cfg, 0.25, True, False) + 7
    assert step_bytes(cfg, small, 7, 8, CPU) == rest + by_hand(cfg, 1.0, True, False) + 7


def test_any_other_block_reads_all_that_it_has():
    @jax.tree_util.register_dataclass
    @dataclass
    class Scaled(FeedForward):
        scale: jax.Array

    block = Scaled(jnp.ones(5))
    assert block.read_bytes(8) == 20 and block.typical(8) is block


@pytest.mark.parametrize("selector", ["top", "threshold", "static"])
def test_the_typical_block_selects_as_many_as_are_expected(selector):
    made = {
        "top": router(LLAMA, Rule(most=3)),
        "threshold": router(LLAMA, Rule(threshold=1e9)),
        "static": Static(selected=jnp.arange(BLOCKS) < 3),
    }[selector]
    block = SparseMlp.of(dense_block(LLAMA), made, unions=(0.25, 0.4, 0.5))
    for rows, share in ((1, 0.25), (4, 0.5)):
        typical = block.typical(rows)
        sites = (jnp.ones((1, rows, LLAMA.hidden_size)),)
        expected = round((0.25 if selector == "static" else share) * BLOCKS)
        assert int(typical.selector.listed(sites).live) == expected
        assert typical.read_bytes(rows, CPU) == block.read_bytes(rows, CPU)


def test_the_dots_only_program_runs_sparse_blocks_at_any_look_ahead():
    cfg, params = LLAMA, params_of("llama")
    x, steps = jnp.ones((1, 1, cfg.hidden_size)), jnp.int32(2)
    run = jax.jit(products, static_argnums=(0, 4))
    for lookahead in (None, 1.0):
        small = with_sparse_blocks(cfg, params, 0.25, lookahead, first=1)
        y = run(cfg, small, x, steps, CPU)
        block = small["layers"][1]["mlp"]
        flipped = replace(block.selector, outer=-block.selector.outer)
        others = small["layers"][0], small["layers"][1] | {"mlp": replace(block, selector=flipped)}
        z = run(cfg, small | {"layers": others}, x, steps, CPU)
        assert jnp.isfinite(y).all() and jnp.abs(y - z).max() > 1e-6
    assert 0 < dots_only(cfg, small, repeats=2) < 1000


@pytest.mark.parametrize("name", ["llama", "parallel"])
def test_a_model_of_sparse_blocks_is_inspected(name):
    cfg = CONFIGS[name]
    params = with_sparse_blocks(cfg, params_of(name), 0.25)
    facts = inspect_decode(cfg, params, ji.full(), 512)
    assert facts["parameter_bytes"] == bytes_of(params)
    assert facts["read_bytes"] == step_bytes(cfg, params) < bytes_of(params)
    assert facts["decode"]["cache_copies"] == 0 and facts["decode"]["traces"] == 1
    assert facts["decode"]["step_ms"] > 0 and facts["decode"]["floor_ms"] > 0


def test_an_early_exit_keeps_the_kinds_of_its_layers():
    cfg = replace(LLAMA, mlps=("gated", "gated"))
    lm = ji.early_exit(ji.LM(cfg, with_sparse_blocks(cfg, params_of("llama"))), 1)
    assert lm.config.mlps == ("gated",) and isinstance(lm.params["layers"][0]["mlp"], SparseMlp)


def test_the_break_even_is_where_a_list_takes_as_long_as_all():
    assert crossing((0.125, 2.0), (0.5, 5.0), 5.0) == pytest.approx(0.5)
    assert crossing((0.125, 2.0), (0.5, 5.0), 4.0) == pytest.approx(0.375)
    assert crossing((0.125, 2.0), (0.5, 5.0), 99.0) == 1 and crossing((0.1, 2), (0.5, 5), 1) == 0
    assert crossing((0.1, 2.0), (0.5, 2.0), 3.0) == 1 and crossing((0.1, 2.0), (0.5, 1.0), 1) == 0


@pytest.mark.parametrize("rows", [1, 4])
def test_the_break_even_is_measured_on_the_models_own_blocks(rows):
    cfg, params = LLAMA, params_of("llama")
    found = break_even(cfg, with_sparse_blocks(cfg, params, 0.25, first=1), rows, CPU)
    assert found is not None and 0 <= found <= 1
    assert break_even(cfg, params, rows, CPU) is None
