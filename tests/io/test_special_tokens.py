"""Named, added and numbered tokens: what each file of a folder says, and which one holds."""

import json
from pathlib import Path

import pytest
from tiny_checkpoints import backend

from jaxinfer.io.tokenizer import Tokenizer, compare_vocabularies

END = {"content": "<|im_end|>", "special": True}


def folder(path: Path, config: dict, files: dict | None = None, **parts: object) -> Path:
    data = json.loads(backend().to_str()) | parts
    (path / "tokenizer.json").write_text(json.dumps(data))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in (files or {}).items():
        (path / name).write_text(json.dumps(content))
    return path


def test_numbered_tokens_keep_their_ids_across_a_gap_and_a_save(tmp_path):
    config = {"added_tokens_decoder": {"300": END, "290": {"content": "<think>"}}}
    loaded = Tokenizer.load(folder(tmp_path, config | {"eos_token": "<|im_end|>"}))
    assert loaded.encode("a<think><|im_end|>") == [64, 290, 300]
    assert loaded.eos_token_ids == (300,)
    assert loaded.decode([64, 290, 300]) == "a<think>"
    (tmp_path / "own").mkdir()
    loaded.save(tmp_path / "own")
    assert Tokenizer.load(tmp_path / "own").encode("<think><|im_end|>") == [290, 300]


def test_an_added_token_keeps_the_id_that_tokenizer_json_gives_it(tmp_path):
    tokens = json.loads(backend().to_str())["added_tokens"]
    new = {"id": 400, "content": "<new>", "special": False}
    assert Tokenizer.load(folder(tmp_path, {}, added_tokens=[*tokens, new])).encode("<new>") == [
        400
    ]


def test_flags_of_a_numbered_token_count(tmp_path):
    strip = {"content": "<x>", "lstrip": True, "rstrip": True, "special": False}
    word = {"content": "word", "single_word": True}
    config = {"added_tokens_decoder": {"260": strip, "261": word}}
    loaded = Tokenizer.load(folder(tmp_path, config))
    assert loaded.encode("a  <x>  a") == [64, 260, 64]
    assert 261 in loaded.encode("a word a") and 261 not in loaded.encode("swords")


def test_a_named_token_of_the_vocabulary_becomes_special(tmp_path):
    config = {"eos_token": "a", "additional_special_tokens": ["b"], "image_token": "c"}
    loaded = Tokenizer.load(folder(tmp_path, config))
    assert loaded.decode(loaded.encode("abcd")) == "d"
    assert loaded.special["image_token"] == "c"


def test_a_named_token_without_an_id_gets_the_next_where_the_model_has_a_row(tmp_path):
    config = {"pad_token": "[PAD]"}
    assert Tokenizer.load(folder(tmp_path, config)).encode("[PAD]") == [260]
    (tmp_path / "config.json").write_text('{"vocab_size": 261}')
    assert Tokenizer.load(tmp_path).encode("[PAD]") == [260]
    (tmp_path / "config.json").write_text('{"vocab_size": 260}')
    with pytest.warns(UserWarning, match=r"neither its vocabulary nor the model's 260.*\[PAD\]"):
        assert len(Tokenizer.load(tmp_path).encode("[PAD]")) == 5


def test_added_tokens_json_is_special_where_it_is_named(tmp_path):
    files = {
        "added_tokens.json": {"<think>": 260, "<end>": 261},
        "special_tokens_map.json": {"eos_token": "<end>"},
    }
    loaded = Tokenizer.load(folder(tmp_path, {}, files))
    assert loaded.decode([260, 261]) == "<think>" and loaded.eos_token_ids == (261,)


CONTRADICTIONS = {
    "flags": (
        {"added_tokens_decoder": {"258": {"content": "</s>", "special": False}}},
        {},
        "differ in how '</s>'",
    ),
    "id": ({"added_tokens_decoder": {"5": END}}, {}, "gives '<|im_end|>' the id 5"),
    "other id": (
        {"added_tokens_decoder": {"300": {"content": "</s>", "special": True}}},
        {},
        "reads it as 258",
    ),
    "names": (
        {"eos_token": "<s>"},
        {"special_tokens_map.json": {"eos_token": "</s>"}},
        "differ in eos_token; '</s>' is used",
    ),
    "bos": ({"bos_token": "<s>", "add_bos_token": True}, {}, "does not add one"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_the_file_beats_the_config_and_the_contradiction_is_said(tmp_path, case):
    config, files, words = CONTRADICTIONS[case]
    with pytest.warns(UserWarning, match=words):
        loaded = Tokenizer.load(folder(tmp_path, config, files))
    assert loaded.encode("a</s>") == [64, 258] and loaded.decode([64, 258]) == "a"


@pytest.mark.parametrize(
    "config",
    [
        {"eos_token": 3},
        {"eos_token": {"content": None}},
        {"added_tokens_decoder": []},
        {"added_tokens_decoder": {"x": END}},
        {"added_tokens_decoder": {"-1": END}},
        {"added_tokens_decoder": {"300": 3}},
        {"added_tokens_decoder": {"300": END | {"lstrip": "yes"}}},
        {"additional_special_tokens": "x"},
        {"additional_special_tokens": [3]},
    ],
    ids=str,
)
def test_tokens_of_wrong_types_are_refused_in_one_line(tmp_path, config):
    with pytest.raises(ValueError) as caught:
        Tokenizer.load(folder(tmp_path, config))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "size, words",
    [(200, r"60 tokens \(ids up to 259\) beyond"), (1000, "260 tokens, the model 1000")],
)
def test_a_tokenizer_of_another_model_is_said(size, words):
    with pytest.warns(UserWarning, match=words):
        compare_vocabularies(Tokenizer.from_backend(backend()), size, "here")
