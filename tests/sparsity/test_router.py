"""LTE's routers: what they begin with, what their gates are, and the router that serves them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.nn.block_mlp import weighted_block_mlp
from jaxinfer.nn.mlp import feed_forward
from jaxinfer.sparsity.base import Router, Rule
from jaxinfer.sparsity.mlp import SparseMlp
from jaxinfer.sparsity.router import SigmoidRouter, as_router, hard, soft, straight_through
from tests.sparsity.test_mlp import BLOCKS, FORMS, dense_block, tokens

UNITS = 12
CFG = BLOCKS["gated"]


def inputs(rows: int = 40) -> jax.Array:
    return jax.random.normal(jax.random.key(4), (rows, CFG.hidden_size))


def trained(start: str = "all_on", **options) -> dict:
    return SigmoidRouter(UNITS, start).init(jax.random.key(0), inputs(), **options)["params"]


def test_routers_begin_with_all_blocks_with_half_or_at_the_centres():
    on = soft(SigmoidRouter(UNITS, "all_on").apply({"params": trained()}, inputs()))
    assert (np.asarray(on) > 0.5).all()
    normal = trained("normal")
    assert set(normal) == {"outer"}
    share = float((as_router(normal).scores(inputs()) > 0).mean())
    assert 0.4 < share < 0.6
    centres = jnp.asarray(np.random.default_rng(0).normal(size=(UNITS, CFG.hidden_size)))
    near = as_router(trained("centres", centres=centres)).scores(3 * centres)
    np.testing.assert_array_equal(near.argmax(axis=1), np.arange(UNITS))
    with pytest.raises(ValueError, match="need these"):
        trained("centres")


def test_the_served_router_selects_what_the_hard_gate_lets_through():
    params = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(1), x.shape),
                          trained() | {"bias": jnp.zeros(UNITS)})  # fmt: skip
    logits = SigmoidRouter(UNITS).apply({"params": params}, inputs())
    selected = as_router(params)((inputs()[None],))
    np.testing.assert_array_equal(selected, hard(logits) == 1)
    assert 0.1 < float(selected.mean()) < 0.9


def test_the_straight_through_gate_has_the_hard_value_and_the_soft_gradient():
    """lte.md 7.4"""
    logits = 3 * jax.random.normal(jax.random.key(2), (50, UNITS))
    np.testing.assert_array_equal(straight_through(logits), hard(logits))
    wanted, found, none = (
        jax.grad(lambda z, gate=gate: (gate(z) * jnp.cos(z)).sum() - jnp.sum(jnp.cos(z)))(logits)
        for gate in (soft, straight_through, hard)
    )
    g = np.asarray(soft(logits))
    by_gate = g * (1 - g) * np.cos(np.asarray(logits))
    np.testing.assert_allclose(found - none, by_gate, atol=1e-6)  # what the gate itself adds
    assert np.abs(np.asarray(wanted - found)).max() > 0.1  # their values differ


@FORMS
def test_open_and_closed_gates_are_the_dense_block_and_its_bias(cfg):
    """lte.md 7.2"""
    dense, x = dense_block(cfg), tokens(cfg, 40)
    width, units = cfg.hidden_size, cfg.intermediate_size // 4
    bias = jnp.full((units,), jnp.inf)

    def block(sign: float) -> SparseMlp:
        router = Router(outer=jnp.zeros((units, width)), bias=sign * bias, rule=Rule(threshold=0.0))
        return SparseMlp.of(dense, router)

    wanted = feed_forward(cfg, dense, x, 0)
    tolerance = 1e-5 * np.abs(wanted).max()
    np.testing.assert_allclose(feed_forward(cfg, block(1.0), x, 0), wanted, atol=tolerance)
    nothing = feed_forward(cfg, block(-1.0), x, 0)
    expected = dense["down"].get("bias", jnp.zeros(width))
    np.testing.assert_array_equal(nothing, jnp.broadcast_to(expected, x.shape))
    flat = x.reshape(-1, width)
    soft_one = weighted_block_mlp(
        block(1.0).weights, flat, jnp.ones((len(flat), units)), activation=cfg.activation
    )
    np.testing.assert_allclose(soft_one.reshape(x.shape), wanted, atol=tolerance)


@FORMS
def test_gates_of_zero_and_one_are_the_selection_exactly(cfg):
    """lte.md 7.4"""
    dense, x = dense_block(cfg), tokens(cfg, 20)
    units, flat = cfg.intermediate_size // 4, x.reshape(-1, cfg.hidden_size)
    params = {"outer": jax.random.normal(jax.random.key(0), (units, cfg.hidden_size))}
    block = SparseMlp.of(dense, as_router(params))

    @jax.jit
    def weighted(x):
        gates = straight_through(as_router(params).scores(x))
        return weighted_block_mlp(block.weights, x, gates, activation=cfg.activation)

    served = jax.jit(lambda x: block(cfg, x))(x)
    np.testing.assert_array_equal(weighted(flat).reshape(x.shape), served)
