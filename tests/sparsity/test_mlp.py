"""A sparse block computes each token with its own selection, however many share the step."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfer as ji
from jaxinfer.lm import LM
from jaxinfer.nn.mlp import feed_forward
from jaxinfer.runtime.backend import Backend
from jaxinfer.sparsity.base import Router, Rule
from jaxinfer.sparsity.mlp import SparseMlp
from jaxinfer.speculative.topology import Topology
from tests.factories import CONFIGS, params_of
from tests.sparsity.blocks import SIZE, dense_block, router, sparse

SIZES = pytest.mark.parametrize("size", [1, 3, 40])
BLOCKS = {"gated": CONFIGS["llama"], "plain": replace(CONFIGS["learned"], mlp_bias=True)}
FORMS = pytest.mark.parametrize("cfg", BLOCKS.values(), ids=BLOCKS)


@pytest.fixture(autouse=True)
def lists_small_blocks(monkeypatch):
    monkeypatch.setattr("jaxinfer.sparsity.mlp.SMALLEST_BLOCK", 1)


def tokens(cfg, size: int):
    return jax.random.normal(jax.random.key(1), (2, size, cfg.hidden_size))


@SIZES
@FORMS
def test_with_all_blocks_it_is_the_dense_one(cfg, size):
    dense, x = dense_block(cfg), tokens(cfg, size)
    wanted = feed_forward(cfg, dense, x, 0)
    found = feed_forward(cfg, sparse(cfg, dense, 1.0), x, 0)
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


def reference(cfg, dense, x, selected):
    """The block in NumPy's order: all neurons, and those not selected set to zero."""
    act = {"silu": jax.nn.silu, "gelu": lambda x: jax.nn.gelu(x, approximate=False)}[cfg.activation]

    def project(part):
        return x @ part["weight"].T + part.get("bias", 0.0)

    hidden = project(dense["up"])
    hidden = act(project(dense["gate"])) * hidden if cfg.gated_mlp else act(hidden)
    every = np.repeat(selected, SIZE, axis=-1)
    return jnp.where(every, hidden, 0) @ dense["down"]["weight"].T + dense["down"].get("bias", 0.0)


@SIZES
@FORMS
@pytest.mark.parametrize("rule", [Rule(most=4), Rule(threshold=3.0), Rule(most=3, threshold=1.0)])
def test_a_token_is_computed_with_the_blocks_of_its_scores(cfg, size, rule):
    dense, x = dense_block(cfg), tokens(cfg, size)
    selector = router(cfg, rule)
    scores = np.asarray(x) @ np.asarray(selector.inner).T @ np.asarray(selector.outer).T
    selected = np.ones(scores.shape, bool)
    if rule.most is not None:
        selected &= scores >= np.sort(scores, axis=-1)[..., -rule.most][..., None]
    if rule.threshold is not None:
        selected &= scores > rule.threshold
    wanted = reference(cfg, dense, x, selected)
    for unions in ((0.1,) * 8, (1.0,) * 8):  # listed, masked
        block = SparseMlp.of(dense, selector, unions=unions)
        found = feed_forward(cfg, block, x, 0, Backend.of("reference"))
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


@FORMS
@pytest.mark.parametrize("rows", [1, 3])
def test_the_kernel_interpreted_gives_the_same(cfg, rows):
    dense, x, found = dense_block(cfg), tokens(cfg, rows)[:1], {}
    block = sparse(cfg, dense, 0.4, unions=(0.4,) * 3)  # listed
    for kind in ("reference", "interpret"):
        found[kind] = feed_forward(cfg, block, x, 0, Backend.of(kind))
    np.testing.assert_allclose(found["interpret"], found["reference"], atol=1e-5)


def test_a_model_of_sparse_blocks_speculates_without_a_loss():
    cfg, params = CONFIGS["llama"], params_of("llama")
    layers = tuple(layer | {"mlp": sparse(cfg, layer["mlp"], 0.5)} for layer in params["layers"])
    lm, dense = LM(cfg, params | {"layers": layers}), LM(cfg, params)
    prompts, options = [[3, 1, 4, 1], [5, 9]], {"max_new_tokens": 24, "ignore_eos": True}
    plain = lm.generate(prompts, **options)
    tree = Topology.from_children([[[], []], []])
    ahead = ji.speculate(lm, dense, tree).generate(prompts, **options)
    assert [one.tokens for one in ahead] == [one.tokens for one in plain]
    assert lm.engine.programs["decode"].traces <= 2  # plain and speculative
    other = dense.generate(prompts, **options)
    assert [one.tokens for one in other] != [one.tokens for one in plain]  # it does select


def test_impossible_blocks_are_refused():
    cfg = CONFIGS["llama"]
    dense, rule = dense_block(cfg), Rule(most=2)
    with pytest.raises(ValueError, match="48 neurons cannot be cut into 7 equal blocks"):
        SparseMlp.of(dense, Router(outer=jnp.zeros((7, cfg.hidden_size)), rule=rule))
    with pytest.raises(ValueError, match="the selector reads a width of 5, the block has 32"):
        SparseMlp.of(dense, Router(outer=jnp.zeros((12, 5)), rule=rule))
