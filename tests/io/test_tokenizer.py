"""Tokenizers: every file layout is read, special ids are known, text survives the round trip."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_checkpoints import TEMPLATE, backend, vocabulary, write_tokenizer

from jaxinfer.io.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_backend(backend(), special={"bos_token": "<s>", "eos_token": "</s>"})


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(max_size=50).filter(lambda text: "<" not in text))
def test_text_survives_the_round_trip(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_special_tokens_are_skipped_unless_asked_for():
    ids = TOKENIZER.encode("a</s>")
    assert ids[-1] == 258
    assert TOKENIZER.decode(ids) == "a" and TOKENIZER.decode(ids, skip_special=False) == "a</s>"


def test_the_vocabulary_counts_added_tokens():
    assert TOKENIZER.vocab_size == len(vocabulary())


def test_a_saved_tokenizer_loads_equal(tmp_path):
    own = Tokenizer.from_backend(
        backend(),
        special={"bos_token": "<s>", "eos_token": "</s>"},
        eos_token_ids=[3],
        chat_template=TEMPLATE,
    )
    own.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.eos_token_ids == (258, 3) and loaded.bos_token_id == 257
    assert loaded.chat_template == TEMPLATE
    assert loaded.encode("x </s>") == own.encode("x </s>")


def test_a_separate_template_file_wins_over_the_config(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("file")
    assert Tokenizer.load(tmp_path).chat_template == "file"


def test_of_several_named_templates_the_default_is_taken(tmp_path):
    write_tokenizer(tmp_path)
    named = [{"name": "rag", "template": "a"}, {"name": "default", "template": "b"}]
    config = {"chat_template": named}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.load(tmp_path).chat_template == "b"


def test_special_tokens_are_read_from_their_own_map(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    special = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.bos_token_id == 257 and loaded.eos_token_ids == (258,)


def test_vocab_and_merges_make_a_byte_level_tokenizer(tmp_path):
    vocab = {token: number for number, token in enumerate([*vocabulary(), "Ġa", "Ġab"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nĠ a\nĠa b\n")
    config = {"bos_token": "</s>", "eos_token": "</s>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode("x ab") == [vocab["</s>"], vocab["x"], vocab["Ġab"]]
    assert loaded.decode(loaded.encode("x ab é")) == "x ab é"


def test_a_post_processor_adds_bos_only_when_asked(tmp_path):
    from jaxinfer.io.tokenizer import prepend_token

    own = backend()
    prepend_token(own, "<s>")
    loaded = Tokenizer.from_backend(own, special={"bos_token": "<s>"})
    assert loaded.encode("a")[0] == 257
    assert loaded.encode("a", add_special=False)[0] != 257


def test_without_a_template_messages_are_refused():
    with pytest.raises(ValueError, match="has no chat template"):
        TOKENIZER.apply_chat_template([{"role": "user", "content": "x"}])


def test_a_lone_surrogate_is_refused():
    with pytest.raises(ValueError, match="surrogate"):
        TOKENIZER.encode("a\ud800")


@pytest.mark.parametrize("ids", [[-1], [2**40]])
def test_ids_out_of_range_are_refused(ids):
    with pytest.raises(ValueError, match="token ids must be"):
        TOKENIZER.decode(ids)


def test_a_special_token_outside_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="eos_token '<end>' is not in"):
        Tokenizer.from_backend(backend(), special={"eos_token": "<end>"})


def test_a_folder_without_tokenizer_says_what_is_expected(tmp_path):
    with pytest.raises(ValueError, match="expected tokenizer.json"):
        Tokenizer.load(tmp_path)


def test_broken_merges_are_refused(tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("a b\n")
    with pytest.raises(ValueError, match="vocab.json and merges.txt are not those of"):
        Tokenizer.load(tmp_path)


def test_a_wordpiece_tokenizer_json_loads(tmp_path):
    model = tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).encode("a") == [0]
