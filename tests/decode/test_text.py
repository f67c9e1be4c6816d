"""`TextStream`: whole characters only, stop strings across token borders, nothing lost."""

import pytest
import tokenizers

from jaxinfer.decode.text import TextStream, special_tokens
from jaxinfer.io.tokenizer import Tokenizer
from tests.factories import PieceTokenizer

BYTES = PieceTokenizer([bytes([i]) for i in range(256)])


def stream(data: bytes, stop=(), step: int = 1) -> tuple[list[str], TextStream]:
    """The pieces of a stream that gets `data` one byte per token, `step` tokens at a time."""
    text = TextStream(BYTES, stop)
    pieces = [text.push(list(data[i : i + step])) for i in range(0, len(data), step)]
    return [*pieces, text.push([], last=True)], text


@pytest.mark.parametrize("text", ["plain", "naïve café", "日本語", "a👩‍👩‍👧b🇫🇷", "\U0001f600" * 9])
@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_pieces_never_split_a_character_and_join_to_the_text(text, step):
    pieces, found = stream(text.encode(), step=step)
    assert "".join(pieces) == text == found.text
    assert all("\ufffd" not in piece for piece in pieces)


def test_a_character_is_sent_as_soon_as_it_is_whole():
    pieces, _ = stream("é!".encode())
    assert pieces == ["", "é", "!", ""]


def test_a_long_text_is_streamed_unchanged():
    text = "".join(f"{i} émoji \U0001f600 and " for i in range(60))
    for step in (1, 5):
        pieces, found = stream(text.encode(), step=step)
        assert "".join(pieces) == text == found.text


@pytest.mark.parametrize("text", ["x" * 1000, "日" * 400, "\U0001f600" * 300, "é" * 500])
@pytest.mark.parametrize("step", [1, 4])
def test_the_work_per_token_does_not_grow_with_the_text(text, step):
    decoded, data = [], text.encode()

    class Counting(PieceTokenizer):
        def decode(self, ids, skip_special=True):
            decoded.append(len(ids))
            return super().decode(ids)

    stream = TextStream(Counting(BYTES.pieces), stop=("never",), kept=8)
    for i in range(0, len(data), step):
        stream.push(list(data[i : i + step]))
    assert max(decoded) < 100 and len(stream.text) <= 8 * step and stream.text in text


def test_tokens_that_never_make_a_character_do_not_pile_up():
    decoded = []

    class Counting(PieceTokenizer):
        def decode(self, ids, skip_special=True):
            decoded.append(len(ids))
            return super().decode(ids)

    stream = TextStream(Counting(BYTES.pieces))
    for _ in range(2000):
        stream.push([0xF0])
    assert max(decoded) < 300 and set(stream.text) == {"\ufffd"}
    assert stream.push(list(b"ok")).endswith("ok")


def test_a_text_longer_than_one_push_of_many_tokens_is_whole():
    text = "日本語 and more, " * 100
    for step in (300, 700):
        pieces, found = stream(text.encode(), step=step)
        assert "".join(pieces) == text == found.text


class Fallback:
    """Byte tokens, of which a run that is no UTF-8 has one U+FFFD per byte (as Llama 2 has)."""

    def decode(self, ids, skip_special=True):
        try:
            return bytes(ids).decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(ids)


def test_a_tokenizer_whose_unfinished_runs_hide_earlier_characters_loses_none():
    text, found = "日本語" * 40, TextStream(Fallback())
    pieces = [found.push([byte]) for byte in text.encode()]
    assert "".join(pieces) == text == found.text


def test_the_names_of_special_tokens_are_known_from_other_texts():
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: i for i, text in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|im_end|>"])
    backend.add_tokens(["<tool>"])
    tokenizer = Tokenizer.from_backend(backend)
    texts = ["<|im_end|>", "<|im_end|>\n", "<tool>", "x", " ", "", "\udcff"]
    assert special_tokens(tokenizer, texts) == {"<|im_end|>": 256}


def test_bytes_that_never_become_a_character_appear_at_the_end_only():
    pieces, found = stream(b"ab\xf0\x9f")
    assert pieces[:-1] == ["a", "b", "", ""]
    assert found.text.startswith("ab") and set(found.text[2:]) == {"\ufffd"}


@pytest.mark.parametrize("step", [1, 2, 5, 100])
def test_a_stop_string_over_several_tokens_ends_the_text_before_it(step):
    pieces, found = stream(b"one two STOP three", stop=("STOP",), step=step)
    assert "".join(pieces) == found.text == "one two "
    assert found.stopped


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_decided():
    pieces, found = stream(b"a STOLE", stop=("STOP",))
    assert pieces == ["a", " ", "", "", "", "STOL", "E", ""]
    assert not found.stopped


def test_what_is_held_back_is_sent_at_the_end():
    pieces, found = stream(b"a STO", stop=("STOP",))
    assert pieces[-1] == "STO" and found.text == "a STO" and not found.stopped


def test_the_earliest_of_several_stop_strings_wins():
    _, found = stream(b"abcdef", stop=("def", "bc", "e"), step=6)
    assert found.text == "a"


def test_overlapping_beginnings_of_a_stop_string_are_found():
    _, found = stream(b"aaab aab", stop=("aab",))
    assert found.text == "a"


def test_a_stop_string_of_several_bytes_per_character_is_found():
    pieces, found = stream("wait\U0001f600\U0001f6d1now".encode(), stop=("\U0001f6d1",))
    assert "".join(pieces) == found.text == "wait\U0001f600"


def test_nothing_follows_a_stop():
    text = TextStream(BYTES, ("x",))
    assert text.push(list(b"abx")) == "ab"
    assert text.push(list(b"more")) == "" and text.push([], last=True) == ""
    assert text.text == "ab"


def test_an_empty_stop_string_stops_nothing():
    _, found = stream(b"abc", stop=("",))
    assert found.text == "abc" and not found.stopped


def test_special_tokens_add_no_text():
    text = TextStream(BYTES)
    assert text.push([*b"hi", BYTES.eos_token_ids[0]], last=True) == "hi"
