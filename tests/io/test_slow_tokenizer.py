"""Slow folders equal the class of transformers that their tokenizer_config.json names."""

import json
from pathlib import Path

import pytest
import tokenizers
from tiny_checkpoints import vocabulary

from jaxinfer.io.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

BYTES = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
MERGES = ["( x", "Ġ x", "x x", "1 2", "Ġ 1", "' t", "Ċ Ċ"]
TEXTS = (
    "def f(x):\n\n    return x12 + 345",
    "  it's don't WE'LL  ",
    "日本語 e\u0301é 😀\t\r\n",
    "<|endoftext|>a<think>b</s>",
    "",
)
VOCAB = {
    token: number
    for number, token in enumerate(
        [*BYTES, *(merge.replace(" ", "") for merge in MERGES), "<|endoftext|>", "<s>", "</s>"]
    )
}
SPECIAL = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>"}
FOLDERS = {
    "GPT2Tokenizer": {},
    "GPT2TokenizerFast": {"add_prefix_space": True},
    "GPT2Tokenizer, OPT's options": SPECIAL | {"add_bos_token": True},
    "Qwen2Tokenizer": {"eos_token": "<|endoftext|>"},
    "GPTNeoXTokenizer": {},
    "CohereTokenizer": {"bos_token": "<s>", "eos_token": "</s>"},
    "RobertaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>"},
}


def write(folder: Path, config: dict, added: dict | None = None) -> Path:
    (folder / "vocab.json").write_text(json.dumps(VOCAB))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if added is not None:
        (folder / "added_tokens.json").write_text(json.dumps(added))
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", FOLDERS)
def test_a_slow_folder_equals_its_class(tmp_path, name):
    kind = name.split(",")[0]
    folder = write(tmp_path, {"tokenizer_class": kind} | FOLDERS[name], {"<think>": len(VOCAB)})
    theirs = getattr(transformers, kind).from_pretrained(folder)
    ours = Tokenizer.load(folder)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids, text
        assert ours.encode(text, add_special=False) == theirs.encode(text, add_special_tokens=False)
        inside = [number for number in ids if number < len(VOCAB) + 1]
        assert ours.decode(inside) == theirs.decode(
            inside, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_ids[:1] == (theirs.eos_token_id,)


def test_a_vocabulary_of_pieces_is_built_by_llama_s_class(tmp_path):
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "▁a": 5}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("▁ a\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    ours = Tokenizer.load(tmp_path)
    theirs = transformers.LlamaTokenizer(vocab=vocab, merges=[("▁", "a")])
    for text in ("a", " a", "a a</s>a", "ab"):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(
            theirs.encode(text), skip_special_tokens=True
        )


@pytest.mark.parametrize("model_type, joined", [("qwen2", False), ("llama", True)])
def test_without_a_class_the_model_s_type_decides(tmp_path, model_type, joined):
    folder = write(tmp_path, {})
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    # Qwen2's class splits every digit from the next, GPT-2's does not
    assert (VOCAB["12"] in Tokenizer.load(folder).encode("x 12")) == joined


def test_a_class_that_is_not_of_transformers_is_refused(tmp_path):
    for name in ("EvilTokenizer", "LlamaForCausalLM", "os.system", "BertTokenizer", "pipeline"):
        folder = write(tmp_path, {"tokenizer_class": name})
        with pytest.raises(ValueError, match="add a tokenizer.json"):
            Tokenizer.load(folder)


def test_building_a_large_slow_vocabulary_touches_no_network(tmp_path, monkeypatch):
    import socket

    def refuse(*_):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    folder = write(tmp_path, {"tokenizer_class": "Qwen2Tokenizer"})
    vocab = {token: number for number, token in enumerate(vocabulary())}
    vocab |= {f"unused{number}": number for number in range(len(vocab), 100_100)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("")
    assert Tokenizer.load(folder).encode("a") == [vocab["a"]]
