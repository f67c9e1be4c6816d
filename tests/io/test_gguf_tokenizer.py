"""GGUF tokenizers: the splits, defaults and ends of a turn that llama.cpp gives each name."""

import pytest
from tiny_checkpoints import vocabulary

from jaxinfer.io.gguf_tokenizer import tokenizer_from_metadata

TOKENS = [*vocabulary()[:256], "<bos>", "<eos>"]


def metadata(more=(), kinds=None, **fields):
    every = [*TOKENS, *more]
    data = {"model": "gpt2", "pre": "gpt-2", "tokens": every, "merges": []}
    data["token_type"] = [1] * 256 + [3] * 2 + (kinds or [3] * len(more))
    data |= {"bos_token_id": 256, "eos_token_id": 257} | fields
    return {f"tokenizer.ggml.{key}": value for key, value in data.items() if value is not None}


def loaded(*args, **fields):
    tokenizer = tokenizer_from_metadata(metadata(*args, **fields), "m.gguf")
    assert tokenizer is not None
    return tokenizer


TEXT = "It's 12345 x=1\n\n 日本 don'T"
SPLITS = {
    "gpt-2": "It|'s| 12345| x|=|1|\n\n| 日本| don|'|T",
    "llama-bpe": "It|'s| |123|45| x|=|1|\n\n| 日本| don|'T",
    "qwen2": "It|'s| |1|2|3|4|5| x|=|1|\n\n| 日本| don|'T",
    "smollm": "It|'s| |1|2|3|4|5| x|=|1|\n\n| 日本| don|'|T",
    "falcon": "It|'|s| |123|45| x|=|1|\n\n| 日本| don|'|T",
    "default": "It|'|s| |123|45| x|=|1|\n\n| 日本| don|'|T",
    "tekken": "It|'s| |1|2|3|4|5| x|=|1|\n\n| 日本| don|'T",
    "gpt-4o": "It's| |123|45| x|=|1|\n\n| 日本| don'T",
    "deepseek-v3": "It|'s| |123|45| x|=|1|\n\n| |日本| don|'T",
    "deepseek-coder": "It|'|s| |1|2|3|4|5| x|=|1|\n|\n| |日本| don|'|T",
}


@pytest.mark.parametrize("pre", SPLITS)
def test_each_pre_tokenizer_splits_as_llama_cpp_does(pre):
    pieces = loaded(pre=pre).backend.pre_tokenizer.pre_tokenize_str(TEXT)
    assert "|".join(TEXT[start:end] for _, (start, end) in pieces) == SPLITS[pre]


@pytest.mark.parametrize(
    "fields, starts",
    [
        ({"pre": "llama-bpe"}, True),
        ({"pre": "tekken"}, True),
        ({"pre": "qwen2"}, False),
        ({"pre": "falcon"}, False),
        ({"pre": "llama-bpe", "add_bos_token": False}, False),
        ({"pre": "qwen2", "add_bos_token": True}, True),
    ],
    ids=str,
)
def test_bos_is_added_by_default_where_llama_cpp_adds_it(fields, starts):
    assert loaded(**fields).encode("a") == [256] * starts + [64]


def test_eos_is_added_where_the_file_asks_for_it():
    assert loaded(add_eos_token=True).encode("a") == [64, 257]


def test_a_whole_word_of_the_vocabulary_is_taken_without_merges_under_llama_3():
    assert loaded(["hello"], [1], pre="llama-bpe").encode("hello") == [256, 258]
    assert len(loaded(["hello"], [1], pre="gpt-2").encode("hello")) == 5


@pytest.mark.parametrize("text", ["<|im_end|>", "<|eom_id|>", "<end_of_turn>", "<|endoftext|>"])
def test_tokens_that_spell_the_end_of_a_turn_end_a_text_and_are_not_shown(text):
    tokenizer = loaded([text], [1])
    assert tokenizer.eos_token_ids == (257, 258)
    assert tokenizer.encode(f"a{text}") == [64, 258] and tokenizer.decode([64, 258]) == "a"


def test_the_end_of_a_message_does_not_end_harmony_s_texts():
    assert 258 in loaded(["<|end|>"]).eos_token_ids
    assert 258 not in loaded(["<|end|>", "<|return|>", "<|call|>"]).eos_token_ids


@pytest.mark.parametrize("key", ["eot", "eom", "fim_pad"])
def test_numbered_ends_count(key):
    fields = {f"{key}_token_id": 64}
    assert loaded(**fields).eos_token_ids == (257, 64)


def test_a_missing_pre_tokenizer_is_said_and_the_default_used():
    with pytest.warns(UserWarning, match="does not name its pre-tokenizer"):
        tokenizer = loaded(pre=None)
    pieces = tokenizer.backend.pre_tokenizer.pre_tokenize_str("a 12345")
    assert [end for _, (_, end) in pieces] == [1, 2, 5, 7]


def test_sentencepiece_defaults_are_those_of_llama_cpp():
    tokens = ["<unk>", "<s>", "</s>", "▁", "a", "▁a", "<think>"]
    fields = {"model": "llama", "tokens": tokens, "token_type": [2, 3, 3, 1, 1, 1, 4]}
    fields |= {"scores": [0.0] * 5 + [-1.0, 0.0], "bos_token_id": None, "eos_token_id": None}
    tokenizer = loaded(**fields, pre=None)
    assert tokenizer.bos_token_id == 1 and tokenizer.eos_token_ids == (2,)
    assert tokenizer.encode("a<think>a</s>") == [1, 5, 6, 5, 2]
    assert tokenizer.decode([1, 5, 6, 2]) == "a<think>"
    bare = loaded(**fields, pre=None, add_space_prefix=False, add_bos_token=False)
    assert bare.encode("a a") == [4, 5]


@pytest.mark.parametrize(
    "fields",
    [
        {"add_bos_token": 1},
        {"add_bos_token": True, "bos_token_id": None},
        {"eot_token_id": 10**6},
        {"merges": ["a"]},
        {"merges": ["a zz"]},
        {"token_type": [1]},
        {"tokens": []},
        {"tokens": [1, 2]},
    ],
    ids=str,
)
def test_wrong_metadata_is_refused_in_one_line(fields):
    with pytest.raises(ValueError, match=r"m\.gguf") as caught:
        loaded(**fields)
    assert "\n" not in str(caught.value)
