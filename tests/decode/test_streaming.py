"""Text as users see it: EOS, stop strings, characters over several tokens, cancelled streams."""

from dataclasses import replace

import pytest

from jaxinfer.lm import LM
from tests.factories import PieceTokenizer, scripted_lm

EMOJI = "\U0001f600".encode()
PIECES = (
    [b"Hello", b", ", b"wor", b"ld: "]
    + [EMOJI[i : i + 1] for i in range(4)]
    + ["é".encode()[:1], "é".encode()[1:] + b"!", b" ST", b"OP", b" and", b" more", b"."]
)
TEXT = b"".join(PIECES).decode()
AFTER_HELLO = TEXT.removeprefix("Hello")


@pytest.fixture(scope="module")
def lm() -> LM:
    return scripted_lm(PIECES)


def test_the_text_ends_at_eos_which_is_the_last_token(lm):
    out = lm.generate("Hello", max_new_tokens=30)[0]
    assert out.text == AFTER_HELLO and out.finish_reason == "eos"
    assert out.tokens == [*range(1, len(PIECES)), lm.config.eos_token_ids[0]]
    assert len(out.log_probs) == len(out.tokens) == out.stats.new_tokens


def test_rows_end_at_their_own_eos(lm):
    outs = lm.generate(["Hello", " more", "wor"], max_new_tokens=30)
    assert [out.text for out in outs] == [AFTER_HELLO, ".", TEXT.split("wor")[1]]
    assert {out.finish_reason for out in outs} == {"eos"}


def test_ignore_eos_goes_on_to_the_limit(lm):
    out = lm.generate("Hello", max_new_tokens=30, ignore_eos=True)[0]
    assert len(out.tokens) == 30 and out.finish_reason == "length"


def test_any_of_several_stop_tokens_ends_a_row(lm):
    other = LM(replace(lm.config, eos_token_ids=(lm.config.eos_token_ids[0], 3, 12)), lm.params)
    assert other.generate([0], max_new_tokens=30)[0].tokens == [1, 2, 3]
    assert other.generate([4], max_new_tokens=30)[0].tokens == [*range(5, 13)]


def test_an_empty_prompt_starts_from_bos(lm):
    assert lm.generate("", max_new_tokens=30)[0].text == TEXT


def test_a_stream_joins_to_the_generated_text(lm):
    pieces = list(lm.stream("Hello", max_new_tokens=30))
    assert "".join(pieces) == AFTER_HELLO
    assert len(pieces) > 1 and all(pieces) and not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("limit", range(1, 16))
def test_a_stream_equals_generate_at_every_limit(lm, limit):
    out = lm.generate("Hello", max_new_tokens=[limit])[0]
    assert "".join(lm.stream("Hello", max_new_tokens=limit)) == out.text
    assert len(out.tokens) == min(limit, len(PIECES))


@pytest.mark.parametrize("stop", ["STOP", ["STOP", "and"], ("P a", "never")])
def test_a_stop_string_over_a_token_border_ends_the_text_before_it(lm, stop):
    out = lm.generate("Hello", max_new_tokens=30, stop=stop)[0]
    strings = [stop] if isinstance(stop, str) else stop
    expected = min((AFTER_HELLO.split(s)[0] for s in strings), key=len)
    assert out.text == expected and out.finish_reason == "stop"
    assert "".join(lm.stream("Hello", max_new_tokens=30, stop=stop)) == expected


def test_a_stop_string_ends_only_its_own_row(lm):
    outs = lm.generate(["Hello", " and"], max_new_tokens=30, stop="STOP")
    assert [out.finish_reason for out in outs] == ["stop", "eos"]
    assert outs[1].text == " more."


def test_a_stop_string_that_does_not_come_changes_nothing(lm):
    out = lm.generate("Hello", max_new_tokens=30, stop=".?")[0]
    assert out.text == AFTER_HELLO and out.finish_reason == "eos"


def test_bad_options_of_a_stream_are_refused_at_the_call(lm):
    with pytest.raises(ValueError, match="max_new_tokens must be from 1"):
        lm.stream("Hello", max_new_tokens=0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_tokens'"):
        lm.stream("Hello", max_tokens=3)


def test_a_closed_stream_does_no_further_work(lm):
    stream = lm.stream("Hello", max_new_tokens=30)
    assert next(stream)
    stream.close()
    assert list(stream) == []
    assert lm.generate("Hello", max_new_tokens=30)[0].text == AFTER_HELLO


def test_a_stream_has_the_completion_that_generate_returns(lm):
    for options in ({}, {"max_new_tokens": 5}, {"stop": "STOP"}, {"stop": "l"}):
        stream = lm.stream("Hello", **options)
        text = "".join(stream)
        out, expected = stream.completion, lm.generate("Hello", **options)[0]
        assert (out.text, out.tokens, out.finish_reason, out.log_probs) == (
            (text, expected.tokens, expected.finish_reason, expected.log_probs)
        )
        assert out.stats.new_tokens == expected.stats.new_tokens


def test_a_cancelled_stream_has_the_completion_of_what_was_made(lm):
    stream = lm.stream("Hello", max_new_tokens=30, stop="wor!")
    assert stream.completion.tokens == [] and stream.completion.text == ""
    assert next(stream) == ", "
    next(stream)
    stream.close()
    out = stream.completion
    assert out.finish_reason == "cancelled" and out.stats.new_tokens == len(out.tokens)
    assert out.text == lm.tokenizer.decode(out.tokens)
    assert AFTER_HELLO.startswith(out.text) and len(out.log_probs) == len(out.tokens)


def test_a_stream_is_of_one_sample(lm):
    with pytest.raises(ValueError, match="a stream is one text, got samples=2; use generate"):
        lm.stream("Hello", samples=2)


class Named(PieceTokenizer):
    """Its special tokens have names, which decoded text does not show."""

    def names(self):
        return {"<s>": self.bos_token_id, "<end>": self.eos_token_ids[0]}

    def encode(self, text, add_special=True):
        return [self.names()[text]] if text in self.names() else super().encode(text, add_special)

    def decode(self, ids, skip_special=True):
        names = {token: name for name, token in self.names().items()}
        if not skip_special and len(ids) == 1 and ids[0] in names:
            return names[ids[0]]
        return super().decode(ids)


@pytest.mark.parametrize("stop", ["<end>", ["never", "<end>"], [["<end>"]]])
def test_the_name_of_a_special_token_stops_at_that_token(lm, stop):
    end = lm.config.eos_token_ids[0]
    no_eos = replace(lm.config, eos_token_ids=())
    other = LM(no_eos, lm.params, Named(PIECES))
    out = other.generate("Hello", max_new_tokens=30, stop=stop)[0]
    assert out.finish_reason == "stop" and out.text == AFTER_HELLO and out.tokens[-1] == end
    assert "".join(other.stream("Hello", max_new_tokens=30, stop=stop)) == AFTER_HELLO
    assert other.generate("Hello", max_new_tokens=30)[0].finish_reason == "length"


def test_a_special_token_stops_only_the_row_that_asked_and_whatever_ignore_eos(lm):
    other = LM(lm.config, lm.params, Named(PIECES))
    outs = other.generate(["Hello"] * 2, max_new_tokens=30, stop=[["<end>"], []], ignore_eos=True)
    assert [out.finish_reason for out in outs] == ["stop", "length"]


def test_a_session_goes_on_after_a_cancelled_stream(lm):
    session = lm.session()
    stream = session.stream("Hello", max_new_tokens=30)
    text = next(stream)
    stream.close()
    kept = lm.tokenizer.decode(session.tokens + session.pending)
    assert kept.startswith("Hello" + text) and TEXT.startswith(kept.rstrip("\ufffd"))
    rest = session.generate(max_new_tokens=30)
    history = session.tokens + session.pending
    assert lm.tokenizer.decode(history) == TEXT and rest.finish_reason == "eos"


def test_a_session_keeps_nothing_behind_a_stop_string(lm):
    session = lm.session()
    assert session.generate("Hello", max_new_tokens=30, stop="STOP").text.endswith("! ")
    assert lm.tokenizer.decode(session.tokens + session.pending).endswith(" STOP")
    streamed = lm.session()
    assert "".join(streamed.stream("Hello", max_new_tokens=30, stop="STOP")).endswith("! ")
    assert streamed.tokens == session.tokens and streamed.pending == session.pending


def test_a_character_cut_by_the_limit_is_replaced_at_the_end_only(lm):
    pieces = list(lm.stream("ld: ", max_new_tokens=2))
    assert "".join(pieces).strip("\ufffd") == ""


def test_the_piece_tokenizer_round_trips():
    tokenizer = PieceTokenizer(PIECES)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
