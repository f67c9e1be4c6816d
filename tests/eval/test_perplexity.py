"""Perplexity, its interval, and the stream reader, against the plain forward without a cache."""

import math

import jax
import numpy as np
import pytest
import scipy.stats

import jaxinfer as ji
from jaxinfer.eval import Reader, perplexity, recompute_perplexity, stream_perplexity, token_stream
from jaxinfer.eval.documents import blocks, regrouped
from jaxinfer.eval.perplexity import bootstrap_interval
from jaxinfer.eval.stream import check_endless
from tests.factories import lm_of, random_tokens


def plain_log_probs(lm, tokens) -> np.ndarray:
    """log p of every token but the first, from one forward."""
    logits = lm.logits(np.asarray(tokens)[None])[0, :-1]
    chosen = jax.nn.log_softmax(logits, axis=-1)[np.arange(len(tokens) - 1), tokens[1:]]
    return np.asarray(chosen)


def test_perplexity_is_that_of_the_plain_forward_over_blocks():
    lm, tokens = lm_of(), random_tokens(1, 70)[0].tolist()
    found = perplexity(lm, [tokens[:50], tokens[50:]], context=30)
    rows = [tokens[:30], tokens[30:50], tokens[50:]]
    parts = [plain_log_probs(lm, row) for row in rows]
    assert found.blocks == 3 and found.tokens == 70 - 3
    np.testing.assert_allclose(found.nll, -np.concatenate(parts).mean(), rtol=1e-5)
    low, high = found.interval
    assert low <= found.perplexity <= high
    assert found.bytes_per_token == 2 * 2 * 2 * 8 * 4  # layers, k and v, heads, size, bytes


def test_one_block_has_no_interval_and_equal_blocks_a_narrow_one():
    assert all(map(math.isnan, bootstrap_interval([1.0], [3])))
    assert bootstrap_interval([3.0, 3.0], [2, 2]) == (1.5, 1.5)
    assert bootstrap_interval([1, 2, 3], [1, 1, 1], seed=3) == bootstrap_interval(
        [1, 2, 3], [1, 1, 1], seed=3
    )


def test_an_interval_is_the_percentile_bootstrap_of_scipy_at_95_percent():
    rng = np.random.default_rng(4)
    sums, counts = rng.gamma(2.0, 10.0, 60), rng.integers(5, 40, 60)
    low, high = bootstrap_interval(sums.tolist(), counts.tolist())
    expected = scipy.stats.bootstrap(
        (sums, counts), lambda s, c, axis: s.sum(axis) / c.sum(axis), paired=True,
        confidence_level=0.95, method="percentile", n_resamples=9999, rng=rng,
    ).confidence_interval  # fmt: skip
    wide = expected.high - expected.low
    # at 90 % it would be 16 % narrower
    assert abs(high - low - wide) < 0.08 * wide
    np.testing.assert_allclose([low, high], expected, atol=0.06 * wide)


def test_texts_without_two_tokens_are_refused():
    with pytest.raises(ValueError, match="2 tokens"):
        perplexity(lm_of(), [[1]])


@pytest.mark.parametrize("chunk", [7, 64])
def test_a_stream_through_the_full_cache_equals_score(chunk):
    lm, tokens = lm_of(), random_tokens(1, 150)[0]
    curve = stream_perplexity(lm, [tokens[:40], tokens[40:]], every=50, chunk=chunk)
    (score,) = lm.score([tokens])
    assert [point.end for point in curve.points] == [51, 101, 150]
    assert curve.tokens == 149 and curve.stopped == ""
    log_probs = np.asarray(score.log_probs)
    means = [-log_probs[i : i + 50].mean() for i in (0, 50, 100)]
    np.testing.assert_allclose([p.nll for p in curve.points], means, rtol=1e-4)
    np.testing.assert_allclose(curve.nll, score.nll, rtol=1e-4)


def test_a_stream_of_a_window_policy_equals_score_and_its_memory_stands_still():
    lm, tokens = lm_of(), random_tokens(1, 400)[0]
    policy = ji.streaming(2, 14)
    short = stream_perplexity(lm, [tokens[:60]], policy, chunk=32)
    curve = stream_perplexity(lm, np.array_split(tokens, 9), policy, every=100, chunk=32)
    (score,) = lm.score([tokens], policy=policy)
    np.testing.assert_allclose(curve.nll, score.nll, rtol=1e-4)
    assert curve.cache_bytes == short.cache_bytes


def test_a_growing_cache_stops_at_its_limit_and_says_so():
    lm, tokens = lm_of(), random_tokens(1, 150)[0]
    curve = stream_perplexity(lm, [tokens], limit=100, chunk=32)
    (score,) = lm.score([tokens[:100]])
    assert "100 tokens" in curve.stopped and curve.tokens == 99
    np.testing.assert_allclose(curve.nll, score.nll, rtol=1e-4)


def test_learned_positions_end_a_stream_at_the_models_context():
    tokens = random_tokens(1, 90)[0]
    curve = stream_perplexity(lm_of("learned"), [tokens], limit=80, chunk=16)
    assert curve.points[-1].end == 64 and curve.stopped


def test_endless_streams_are_refused_with_the_remedy():
    check_endless(ji.streaming(2, 6))
    for policy in (ji.full(), ji.h2o(4, 4)):
        with pytest.raises(ValueError, match="choose streaming"):
            check_endless(policy)


@pytest.mark.parametrize("stride", [1, 5])
def test_recomputation_reads_each_window_anew(stride):
    lm, tokens, window = lm_of(), random_tokens(1, 43)[0], 16
    curve = recompute_perplexity(
        lm, [tokens[:9], tokens[9:]], window=window, stride=stride, every=1
    )
    found = [-point.nll for point in curve.points]
    assert [point.end for point in curve.points] == list(range(2, 44))
    expected = []
    head = window // stride * stride
    expected += plain_log_probs(lm, tokens[:head]).tolist()
    for end in [*range(head + stride, 43, stride), 43]:
        new = min(stride, end - head - (len(expected) - head + 1))
        row = tokens[max(end - window, 0) : end]
        expected += plain_log_probs(lm, row)[-new:].tolist()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_recomputation_of_a_short_stream_is_one_forward():
    lm, tokens = lm_of(), random_tokens(1, 20)[0]
    curve = recompute_perplexity(lm, [tokens], window=32, stride=4)
    np.testing.assert_allclose(curve.nll, -plain_log_probs(lm, tokens).mean(), rtol=1e-5)
    with pytest.raises(ValueError, match="stride"):
        recompute_perplexity(lm, [tokens], window=4, stride=4)


def test_a_reader_judges_rows_side_by_side():
    lm, tokens = lm_of(), random_tokens(3, 30)
    reader = Reader(lm, ji.full(), 30, rows=3, chunk=8)
    parts = [reader.read(tokens[:, :11]), reader.read(tokens[:, 11:])]
    log_probs = np.concatenate([part.log_probs for part in parts], axis=1)
    best = np.concatenate([part.best for part in parts], axis=1)
    for row in range(3):
        np.testing.assert_allclose(log_probs[row], plain_log_probs(lm, tokens[row]), atol=1e-4)
    likeliest = np.asarray(lm.logits(tokens)).argmax(-1)[:, :-1]
    assert (best == (likeliest == tokens[:, 1:])).all()


def test_a_reader_warns_of_more_positions_than_were_trained():
    lm = lm_of()
    Reader(lm, ji.streaming(4, 4091), 64)
    with pytest.warns(UserWarning, match="spans 4097 positions .* exceed the 4096 positions"):
        Reader(lm, ji.streaming(4, 4092), 64)


def test_a_token_stream_has_its_limit_and_repeats_its_texts():
    lm = lm_of()
    texts = [[1, 2, 3], [4, 5]]
    assert np.concatenate(list(token_stream(lm, texts))).tolist() == [1, 2, 3, 4, 5]
    repeated = np.concatenate(list(token_stream(lm, texts, 9, repeat=True)))
    assert repeated.tolist() == [1, 2, 3, 4, 5, 1, 2, 3, 4]


def test_regrouping_and_blocks_lose_no_token_but_lonely_ones():
    arrays = np.split(np.arange(23), [3, 4, 15])
    assert [len(x) for x in regrouped(arrays, 5)] == [5, 5, 5, 5, 3]
    assert np.concatenate(list(regrouped(arrays, 5))).tolist() == list(range(23))
    assert blocks(list(range(7)), 3) == [[0, 1, 2], [3, 4, 5]]
    assert blocks([1, 2, 3], None) == [[1, 2, 3]]


@pytest.mark.slow
def test_a_million_tokens_need_no_more_memory_than_the_first_ones():
    lm = lm_of()
    rng = np.random.default_rng(0)
    stream = (rng.integers(0, 61, 4096).astype(np.int32) for _ in range(256))
    held: list[int] = []

    def count(tokens: int) -> None:
        if tokens % 2**18 < 512:
            held.append(sum(x.nbytes for x in jax.live_arrays()))

    curve = stream_perplexity(lm, stream, ji.streaming(4, 60), every=2**16, report=count)
    assert curve.tokens == 2**20 - 1
    assert max(held) <= held[0] + 2**16
