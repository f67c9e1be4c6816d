"""A toy trained behind a learnable sink token cannot stream without it (arXiv 2309.17453, table 3).

The tokens are those of "bigram-backcopy": a head copies at a few tokens and has nothing to look at
elsewhere, so it looks at the first token there. The sink token is the model's BOS. Measured:
perplexity 12.5 without it, 8.59 with it, with four sinks, and recomputed.
"""

import numpy as np
import pytest

import jaxinfer as ji
from tools.reproduce.figures import read_rows
from tools.reproduce.reproduce_streaming import SINK, TRIGGERS, backcopy, recomputed, train_backcopy

KEPT = 64


@pytest.mark.slow
def test_a_trained_sink_token_suffices_and_without_it_the_stream_falls_apart():
    lm = train_backcopy(layers=2, context=2 * KEPT, steps=600)
    row = np.concatenate([[SINK], backcopy(1, 2048, seed=1)[0]]).astype(np.int32)
    nll = {}
    for sinks in (0, 1, 4):
        log_probs, _ = read_rows(lm, ji.streaming(sinks, KEPT - sinks), row[None])
        nll[sinks] = -log_probs[0, KEPT:].mean()
    oracle = -recomputed(lm, row, KEPT).mean()
    perplexity = {sinks: np.exp(value) for sinks, value in nll.items()}
    assert perplexity[0] > 1.25 * np.exp(oracle), (perplexity, np.exp(oracle))
    assert perplexity[1] < 1.02 * np.exp(oracle), (perplexity, np.exp(oracle))
    np.testing.assert_allclose(perplexity[4], perplexity[1], rtol=0.01)


def test_a_trigger_is_followed_by_what_stood_before_it():
    rows = backcopy(4, 300, seed=2)
    copied = 0
    for row in rows:
        for t in range(3, 300):
            if row[t - 1] < TRIGGERS <= min(row[t - 2], row[t - 3]):
                copied += 1
                assert row[t] == row[t - 3 if row[t - 1] % 2 else t - 2]
    assert copied > 30 and (rows == backcopy(4, 300, seed=2)).all()
