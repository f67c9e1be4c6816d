"""The L1 on hidden activations against its definition by hand."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.models.params import init_params
from jaxinfer.models.stack import forward
from jaxinfer.nn.mlp import feed_forward
from jaxinfer.testing.quick import quick_jit
from jaxinfer.train.language_model import next_token_loss
from jaxinfer.train.sparse_activations import (
    growing_weight,
    held_out_density,
    losses_and_activity,
    sparse_next_token_loss,
)
from tools.data.train_tiny import model_config

CONFIG = replace(model_config("opt", 64, 32, 2, 16), intermediate_size=48)
PARAMS = init_params(CONFIG, jax.random.key(0))
TOKENS = np.random.default_rng(0).integers(1, 64, (2, 17)).astype(np.int32)
KEY = jax.random.key(0)

quick = functools.partial(quick_jit, static_argnums=())
sparse_loss = quick(jax.value_and_grad(sparse_next_token_loss(CONFIG), has_aux=True))
plain_loss = quick(jax.value_and_grad(next_token_loss(CONFIG), has_aux=True))


@functools.cache
def hidden_by_hand():
    """Per layer the block's input x [B, T, D] and the numbers before the ReLU [B, T, F]."""
    found = []

    def watching(cfg, block, x, layer):
        before = np.asarray(x) @ np.asarray(block["up"]["weight"]).T + block["up"]["bias"]
        found.append((np.asarray(x), np.asarray(before)))
        return feed_forward(cfg, block, x, layer)

    forward(CONFIG, PARAMS, jnp.asarray(TOKENS[:, :-1]), mlp=watching)
    return found


def value_and_gradient(weight):
    return sparse_loss(PARAMS, {"tokens": jnp.asarray(TOKENS), "l1": jnp.float32(weight)}, KEY)


def test_the_penalty_is_the_sum_over_layers_of_the_mean_absolute_activation():
    hidden = [np.maximum(before, 0) for _, before in hidden_by_hand()]
    (value, metrics), _ = value_and_gradient(0.7)
    (nats, _), _ = plain_loss(PARAMS, jnp.asarray(TOKENS), KEY)
    np.testing.assert_allclose(metrics["l1"], sum(h.mean() for h in hidden), rtol=1e-5)
    np.testing.assert_allclose(metrics["nats"], nats, rtol=1e-5)
    np.testing.assert_allclose(value, nats + 0.7 * metrics["l1"], rtol=1e-5)
    for layer, h in enumerate(hidden):
        np.testing.assert_allclose(metrics[f"density_{layer}"], (h > 0).mean(), atol=1e-6)


def test_the_penalty_s_gradient_in_the_last_block_is_that_of_its_own_activations():
    # the last block's `up` acts on no other activations: d mean(h) / d bias_i is the share of
    # tokens at which neuron i is active, over the number of neurons
    x, before = hidden_by_hand()[-1]
    active = (before > 0).astype(np.float32) / before.size
    (_, with_l1), (_, without) = value_and_gradient(3.0), value_and_gradient(0.0)
    up = jax.tree.map(lambda a, b: a - b, with_l1, without)["layers"][-1]["mlp"]["up"]
    np.testing.assert_allclose(up["bias"], 3 * active.sum(axis=(0, 1)), atol=1e-6)
    expected = 3 * np.einsum("btf,btd->fd", active, x)
    np.testing.assert_allclose(up["weight"], expected, atol=1e-6)
    down = jax.tree.map(lambda a, b: a - b, with_l1, without)["layers"][-1]["mlp"]["down"]
    assert np.abs(down["weight"]).max() < 1e-7  # no part of any penalty


def test_without_weight_the_gradient_is_that_of_the_plain_loss():
    _, got = value_and_gradient(0.0)
    _, expected = plain_loss(PARAMS, jnp.asarray(TOKENS), KEY)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), got, expected)


def test_the_weight_grows_along_half_a_cosine_and_stays():
    assert growing_weight(0, 2.0, 100) == 0
    assert growing_weight(50, 2.0, 100) == pytest.approx(1.0)
    assert growing_weight(100, 2.0, 100) == growing_weight(10**6, 2.0, 100) == 2.0
    weights = [growing_weight(step, 2.0, 100) for step in range(101)]
    assert all(low < high for low, high in zip(weights, weights[1:], strict=False))
    assert growing_weight(0, 2.0, 0) == 2.0


def test_the_held_out_density_is_the_mean_over_whole_windows():
    rows = [np.arange(1, 40) % 63 + 1, [5, 6], np.arange(40) % 60 + 2]
    documents = [(np.asarray(row).tolist(), 1) for row in rows]
    windows = [[0, *rows[0][:16]], rows[0][15:32], [0, *rows[2][:16]], rows[2][15:32]]
    density = quick_jit(losses_and_activity)(CONFIG, PARAMS, jnp.asarray(np.stack(windows)))[2]
    got = held_out_density(CONFIG, PARAMS, documents, length=16, end=0, batch_size=2)
    np.testing.assert_allclose(got, density, atol=1e-6)
    some = held_out_density(CONFIG, PARAMS, documents, length=16, end=0, max_windows=2)
    first = quick_jit(losses_and_activity)(CONFIG, PARAMS, jnp.asarray(np.stack(windows[:2])))[2]
    np.testing.assert_allclose(some, first, atol=1e-6)
    with pytest.raises(ValueError, match="no document has 16 tokens"):
        held_out_density(CONFIG, PARAMS, [([1, 2], 3)], length=16, end=0)
