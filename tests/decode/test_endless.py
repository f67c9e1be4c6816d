"""Streams without end: the same text as bounded ones, in memory that does not grow."""

import itertools

import pytest

import jaxinfer as ji
from jaxinfer.decode.capacity import ENDLESS_BUFFER
from jaxinfer.lm import LM
from tests.factories import CONFIGS, PieceTokenizer, lm_of, params_of, random_tokens

POLICY = ji.streaming(2, 13)
WARM = ji.Sampler(temperature=1.2)  # a greedy random model soon repeats itself
LONG = 5 * ENDLESS_BUFFER + 3
OPTIONS = {"policy": POLICY, "sampler": WARM, "seed": 7}


@pytest.fixture(scope="module")
def lm() -> LM:
    """A random model whose every token is one letter; it has no end of text."""
    letters = [bytes([64 + i]) for i in range(CONFIGS["llama"].vocab_size - 2)]
    return LM(CONFIGS["llama"], params_of("llama"), PieceTokenizer(letters))


@pytest.fixture(scope="module")
def bounded(lm) -> ji.Completion:
    return lm.generate("ABC", max_new_tokens=LONG, **OPTIONS)[0]


def test_an_endless_stream_begins_like_a_bounded_text(lm, bounded):
    stream = lm.stream("ABC", max_new_tokens=None, **OPTIONS)
    text = ""
    while len(text) < len(bounded.text):
        text += next(stream)
    stream.close()
    assert text[: len(bounded.text)] == bounded.text
    assert stream.completion.tokens[:LONG] == bounded.tokens
    assert stream.completion.finish_reason == "cancelled"


def test_an_endless_stream_remembers_its_newest_tokens_only(lm, bounded, monkeypatch):
    monkeypatch.setattr("jaxinfer.decode.run.ENDLESS_KEPT", 32)
    stream = lm.stream("ABC", max_new_tokens=None, **OPTIONS)
    for _ in itertools.takewhile(lambda _: stream.completion.stats.new_tokens < 200, stream):
        pass
    out = stream.completion
    assert 200 <= out.stats.new_tokens < 204
    assert out.tokens == bounded.tokens[: out.stats.new_tokens][-32:]
    assert len(out.log_probs) == 32 and bounded.text.find(out.text) > 0


@pytest.mark.parametrize("policy", [ji.full(), ji.h2o(8, 8), ji.streaming(positions="absolute")])
def test_what_grows_cannot_go_on_for_ever(lm, policy):
    with pytest.raises(ValueError, match="cannot go on for ever"):
        lm.stream("ABC", max_new_tokens=None, policy=policy)


def test_what_never_ends_cannot_be_returned(lm):
    with pytest.raises(ValueError, match="max_new_tokens=None never ends; use stream"):
        lm.generate("ABC", max_new_tokens=None, policy=POLICY)
    session = lm.session(POLICY)
    with pytest.raises(ValueError, match="max_new_tokens=None never ends; use stream"):
        session.generate("ABC", max_new_tokens=None)
    assert len(session.generate("ABC", max_new_tokens=3).tokens) == 3


def test_an_endless_stream_of_a_session_is_remembered_whole(lm, monkeypatch):
    monkeypatch.setattr("jaxinfer.decode.run.ENDLESS_KEPT", 8)
    session = lm.session(POLICY)
    text = "".join(itertools.islice(session.stream("ABC", max_new_tokens=None, sampler=WARM), 20))
    held = session.tokens + session.pending
    assert lm.tokenizer.decode(held) == "ABC" + text
    assert session.generate(max_new_tokens=4).tokens == (
        lm.generate(held, max_new_tokens=4, policy=POLICY)[0].tokens
    )


def test_a_streaming_session_goes_past_its_window_turn_by_turn():
    lm, told = lm_of(), []
    session = lm.session(POLICY)
    for turn, size in enumerate((9, 30, 3, 17)):
        told += random_tokens(1, size, seed=turn)[0].tolist()
        prompt = told[-size:]
        expected = lm.generate([told], max_new_tokens=8, policy=POLICY)[0].tokens
        assert session.generate(prompt, max_new_tokens=8).tokens == expected
        told += expected
    assert session.tokens + session.pending == told and len(told) > 5 * 15
    assert session.cache.layers[0][1].k.size == lm.session(POLICY).cache.layers[0][1].k.size
