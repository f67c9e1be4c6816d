"""The next-token loss and its held-out form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.models.params import init_params
from jaxinfer.models.stack import forward
from jaxinfer.train.language_model import held_out_loss, next_token_loss, token_losses
from tests.train.tiny_run import CONFIG

PARAMS = init_params(CONFIG, jax.random.key(0))
TOKENS = np.random.default_rng(0).integers(1, CONFIG.vocab_size, 41)


def test_token_losses_are_the_negative_log_probabilities():
    tokens = jnp.asarray(TOKENS, jnp.int32)[None, :12]
    log_probs = jax.nn.log_softmax(forward(CONFIG, PARAMS, tokens[:, :-1]).logits, axis=-1)
    expected = -np.take_along_axis(np.asarray(log_probs), np.asarray(tokens)[:, 1:, None], axis=2)
    losses = token_losses(CONFIG, PARAMS, tokens)
    np.testing.assert_allclose(losses, expected[..., 0], rtol=1e-5)
    value, metrics = next_token_loss(CONFIG)(PARAMS, tokens, jax.random.key(0))
    np.testing.assert_allclose(value, losses.mean(), rtol=1e-6)
    assert metrics == {}


def test_held_out_loss_predicts_every_token_of_every_document_once():
    documents = [(TOKENS[:25].tolist(), 60), (TOKENS[25:].tolist(), 40)]
    loss = held_out_loss(CONFIG, PARAMS, documents, length=16, end=0, batch_size=2)
    assert (loss.tokens, loss.size, loss.documents) == (41, 100, 2)
    expected = 0.0
    for row in ([0, *TOKENS[:25]], [0, *TOKENS[25:]]):
        for start in range(0, len(row) - 1, 16):
            window = jnp.asarray(row[start : start + 17], jnp.int32)[None]
            expected += float(token_losses(CONFIG, PARAMS, window).sum())
    np.testing.assert_allclose(loss.nats, expected, rtol=1e-5)
    np.testing.assert_allclose(loss.bits_per_byte, expected / np.log(2) / 100, rtol=1e-5)


def test_a_window_limit_ends_after_a_whole_document():
    documents = [(TOKENS[:25].tolist(), 60), (TOKENS[25:].tolist(), 40)]
    loss = held_out_loss(CONFIG, PARAMS, documents, length=16, end=0, max_windows=1)
    assert (loss.tokens, loss.documents) == (25, 1)


def test_no_documents_is_an_error():
    with pytest.raises(ValueError, match="no held-out documents"):
        held_out_loss(CONFIG, PARAMS, [], length=16, end=0)
