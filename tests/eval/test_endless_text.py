"""Streams without end: which policies may read them, where they stop, and texts in pieces."""

import io
import sys
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import tokenizers as hf

import jaxinfer as ji
from jaxinfer.cli import score as verb
from jaxinfer.cli import text_input
from jaxinfer.eval import stream, stream_perplexity
from jaxinfer.eval.stream import check_endless
from jaxinfer.eval.text_pieces import text_tokens
from jaxinfer.io.load import load_checkpoint
from jaxinfer.io.tokenizer import Tokenizer, prepend_token
from jaxinfer.lm import LM
from tests.factories import BASE, lm_of, params_of, random_tokens

TEXT = (
    "Of twenty-two cats, 1234567 were seen (twice?) -- it's true.\n\nThey said: «naïve»,  and\n"
    "\tleft; 日本語のテキスト。\nfoo_bar = x[1:] # none\r\n<|endoftext|> The end of the day came\n"
)


def text_of(count: int) -> str:
    """Words, numbers, spaces and line breaks in random order."""
    rng = np.random.default_rng(0)
    words = ["the", "Cat", "naïve", "日本", "12345", "é", "'s", "…", ".", ",", "<|endoftext|>"]
    parts = [*words, "🙂", " ", " ", " ", " ", "  ", "\n", "\n\n", "\t", " \n"]
    return TEXT + "".join(rng.choice(parts, count))


def pieces_of(text: str, size: int) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


@pytest.fixture(scope="module")
def backends() -> dict:
    """Byte-level tokenizers with the word splits of GPT-2, of ours, of Llama 3 and Qwen 2, and two
    that join words across spaces."""
    tiny = load_checkpoint("tiny-llama").tokenizer
    found = {"tiny-llama": tiny.backend}
    split = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    words = hf.pre_tokenizers.Split(hf.Regex(split), "isolated")
    level = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    splits = {
        "gpt2": hf.pre_tokenizers.ByteLevel(add_prefix_space=False),
        "prefix": hf.pre_tokenizers.ByteLevel(add_prefix_space=True),
        "llama3": hf.pre_tokenizers.Sequence([words, level]),
        "metaspace": hf.pre_tokenizers.Metaspace(prepend_scheme="first"),
        "whole": level,
    }
    for name, pre_tokenizer in splits.items():
        backend = hf.Tokenizer(hf.models.BPE())
        backend.pre_tokenizer = pre_tokenizer
        trainer = hf.trainers.BpeTrainer(
            vocab_size=600, initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<s>", "<|endoftext|>"], show_progress=False,
        )  # fmt: skip
        backend.train_from_iterator([text_of(3000)], trainer)
        if name == "llama3":
            prepend_token(backend, "<s>")
        found[name] = backend
    return found


def reading(backend) -> LM:
    """A model that reads with this tokenizer; only `encode` is used."""
    size = backend.get_vocab_size()
    return LM(replace(BASE, vocab_size=size), params_of("llama"), Tokenizer(backend))


@pytest.mark.parametrize("name", ["tiny-llama", "gpt2", "prefix", "llama3", "metaspace", "whole"])
@pytest.mark.parametrize("size", [7, 300, 1000])
def test_a_text_in_pieces_has_the_tokens_of_the_whole(backends, name, size):
    lm, text = reading(backends[name]), text_of(4000)
    found = list(text_tokens(lm, pieces_of(text, size)))
    assert np.concatenate(found).tolist() == lm.encode(text)
    if size >= 300 and name not in ("metaspace", "whole"):
        assert len(found) > len(text) // size // 2  # it was cut nearly everywhere


def test_a_short_text_and_an_empty_one_are_one_piece(backends):
    lm = reading(backends["llama3"])
    assert [x.tolist() for x in text_tokens(lm, ["Hi", " you"])] == [lm.encode("Hi you")]
    assert [x.tolist() for x in text_tokens(lm, [])] == [lm.encode("")]


def test_a_policy_per_layer_is_endless_if_all_of_them_are():
    check_endless(ji.per_layer([ji.streaming(4, 60), ji.streaming(4, 28)]))
    for other in (ji.full(), ji.h2o(4, 4), ji.streaming(4, 60, positions="absolute")):
        with pytest.raises(ValueError, match="choose streaming"):
            check_endless(ji.per_layer([ji.streaming(4, 60), other]))


def test_a_policy_per_layer_reads_past_the_models_positions():
    lm, tokens = lm_of(), random_tokens(1, 4608)
    policy = ji.per_layer([ji.streaming(2, 14), ji.streaming(2, 30)])
    curve = stream_perplexity(lm, tokens, policy)
    assert curve.tokens == 4607 > lm.config.max_positions and not curve.stopped


def test_a_stream_stops_before_its_positions_wrap(monkeypatch):
    assert stream.LONGEST < 2**31 - 2**15
    monkeypatch.setattr(stream, "LONGEST", 100)
    curve = stream_perplexity(lm_of(), random_tokens(1, 150), ji.streaming(2, 14))
    assert curve.points[-1].end == 100
    assert curve.stopped == "after 100 tokens: the limit of int32 positions"


def test_a_window_beyond_the_trained_positions_is_warned_of():
    with (
        pytest.warns(UserWarning, match="exceed the 4096 positions"),
        pytest.raises(ValueError, match="nothing to score"),
    ):
        stream_perplexity(lm_of(), [], ji.streaming(4, 4092))


class Bytes:
    """Every byte is a token."""

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        return [byte % 61 for byte in text.encode()]


def byte_lm() -> LM:
    return LM(BASE, params_of("llama"), Bytes())


def files_score(lm, path, policy) -> dict:
    with open(path, "rb") as file:
        return verb._stream(lm, file, str(path), None, policy, None)


@pytest.mark.parametrize(
    "data, byte", [(b"a" * 33 + b"\xff" + b"b" * 9, 33), (("é" * 8).encode() + b"\xc3", 16)]
)
def test_bytes_that_are_no_text_are_refused_with_their_place(data, byte, monkeypatch):
    monkeypatch.setattr(text_input, "PIECE", 16)
    with pytest.raises(ValueError, match=f"x is not UTF-8 text .byte {byte}."):
        list(text_input.pieces(io.BytesIO(data), "x"))


def test_a_text_on_a_pipe_scores_as_a_file(tmp_path, monkeypatch):
    lm = byte_lm()
    (tmp_path / "text").write_text(text_of(2000))
    expected = files_score(lm, tmp_path / "text", ji.streaming(2, 14))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text_of(2000).encode())))
    with text_input.opened("-") as file:
        assert verb._stream(lm, file, "-", None, ji.streaming(2, 14), None) == expected
    assert expected["tokens"] == len(text_of(2000).encode())


@pytest.mark.slow
def test_a_long_file_takes_no_more_host_memory_than_a_short_one(tmp_path):
    lm, path, peaks = byte_lm(), tmp_path / "text", []
    for size in (2**16, 2**16, 2**18):  # the first compiles
        path.write_bytes((TEXT * (size // len(TEXT.encode()))).encode())
        tracemalloc.start()
        record = files_score(lm, path, ji.streaming(2, 14))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert record["tokens"] == path.stat().st_size
    assert peaks[2] < peaks[1] + 2**17, peaks
