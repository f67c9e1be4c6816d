"""The next-token loss and its held-out form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.models.params import init_params
from jaxinfer.models.stack import forward
from jaxinfer.testing.quick import quick_jit
from jaxinfer.train.language_model import held_out_loss, next_token_loss, token_losses
from tests.train.tiny_run import CONFIG

LENGTH = 16
PARAMS = init_params(CONFIG, jax.random.key(0))
TOKENS = np.random.default_rng(0).integers(1, CONFIG.vocab_size, 41)

losses_of = quick_jit(token_losses)


@quick_jit
def log_probs_of(cfg, params, tokens):
    return jax.nn.log_softmax(forward(cfg, params, tokens).logits, axis=-1)


def test_token_losses_are_the_negative_log_probabilities():
    tokens = jnp.asarray(TOKENS[None, : LENGTH + 1], jnp.int32)
    log_probs = log_probs_of(CONFIG, PARAMS, tokens[:, :-1])
    expected = -np.take_along_axis(np.asarray(log_probs), np.asarray(tokens)[:, 1:, None], axis=2)
    losses = np.asarray(losses_of(CONFIG, PARAMS, tokens))
    np.testing.assert_allclose(losses, expected[..., 0], rtol=1e-5)
    loss = functools.partial(quick_jit, static_argnums=())(next_token_loss(CONFIG))
    value, metrics = loss(PARAMS, tokens, jax.random.key(0))
    np.testing.assert_allclose(value, losses.mean(), rtol=1e-6)
    assert metrics == {}


def test_held_out_loss_predicts_every_token_of_every_document_once():
    documents = [(TOKENS[:25].tolist(), 60), (TOKENS[25:].tolist(), 40)]
    loss = held_out_loss(CONFIG, PARAMS, documents, length=LENGTH, end=0, batch_size=2)
    assert (loss.tokens, loss.size, loss.documents) == (41, 100, 2)
    expected = 0.0
    for row in ([0, *TOKENS[:25]], [0, *TOKENS[25:]]):
        for start in range(0, len(row) - 1, LENGTH):
            window = row[start : start + LENGTH + 1]
            padded = np.ones((1, LENGTH + 1), np.int32)  # behind the window: no part of its losses
            padded[0, : len(window)] = window
            losses = np.asarray(losses_of(CONFIG, PARAMS, jnp.asarray(padded)))
            expected += float(losses[0, : len(window) - 1].sum())
    np.testing.assert_allclose(loss.nats, expected, rtol=1e-5)
    np.testing.assert_allclose(loss.bits_per_byte, expected / np.log(2) / 100, rtol=1e-5)


def test_a_window_limit_ends_after_a_whole_document():
    documents = [(TOKENS[:25].tolist(), 60), (TOKENS[25:].tolist(), 40)]
    loss = held_out_loss(
        CONFIG, PARAMS, documents, length=LENGTH, end=0, batch_size=2, max_windows=1
    )
    assert (loss.tokens, loss.documents) == (25, 1)


def test_no_documents_is_an_error():
    with pytest.raises(ValueError, match="no held-out documents"):
        held_out_loss(CONFIG, PARAMS, [], length=16, end=0)
