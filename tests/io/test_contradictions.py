"""A checkpoint against its own config: the file is believed, and one line says what differs."""

import hashlib
import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from tiny_checkpoints import CONFIG, finish, gguf_file, gguf_writer, hf_folder, tensors

from jaxinfer.io.convert import convert
from jaxinfer.io.gguf import GGUFFile
from jaxinfer.io.load import load_checkpoint
from jaxinfer.models.registry import family_for

TIED = CONFIG | {"tie_word_embeddings": True}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def test_a_head_of_its_own_unties_a_tied_config(tmp_path):
    weights = tensors()
    with pytest.warns(UserWarning, match="ties the head to the embedding, the file holds another"):
        found = load_checkpoint(hf_folder(tmp_path / "m", TIED, weights), "float32")
    assert not found.config.tie_embeddings
    np.testing.assert_array_equal(found.params["head"]["weight"], weights[HEAD])


def test_a_second_copy_of_the_embedding_leaves_it_tied(tmp_path, recwarn):
    weights = tensors()
    weights[HEAD] = weights[EMBEDDING].copy()
    found = load_checkpoint(hf_folder(tmp_path / "m", TIED, weights), "float32")
    assert found.config.tie_embeddings and "head" not in found.params
    assert not [w for w in recwarn if "head" in str(w.message)]


def test_a_tied_model_may_store_its_head_alone(tmp_path):
    weights = tensors()
    weights.pop(EMBEDDING)
    found = load_checkpoint(hf_folder(tmp_path / "m", TIED, weights), "float32")
    np.testing.assert_array_equal(found.params["embed"]["tokens"], weights[HEAD])


def test_an_untied_model_without_its_head_says_which_setting_would_do(tmp_path):
    weights = tensors()
    weights.pop(HEAD)
    with pytest.raises(ValueError, match="lacks tensor 'lm_head.weight', the head; if the embed"):
        load_checkpoint(hf_folder(tmp_path / "m", weights=weights), "float32")


def test_layers_beyond_the_config_are_said(tmp_path):
    folder = hf_folder(tmp_path / "m", CONFIG | {"num_hidden_layers": 1}, tensors())
    with pytest.warns(UserWarning, match=r"9 tensors .*config says 1 layers, the file has 2"):
        found = load_checkpoint(folder, "float32")
    assert len(found.params["layers"]) == 1


def test_biases_that_the_config_denies_are_said(tmp_path):
    name = "model.layers.0.self_attn.q_proj.bias"
    folder = hf_folder(tmp_path / "m", weights=tensors() | {name: np.ones(32, np.float32)})
    with pytest.warns(UserWarning, match=f"not part of the llama model of the config.*{name}"):
        load_checkpoint(folder, "float32")


@pytest.mark.parametrize(
    ("change", "tensor"),
    [
        ({"vocab_size": 259, "eos_token_id": 1}, "embed_tokens.weight' has shape [260, 32]"),
        ({"head_dim": 16}, "k_proj.weight' has shape [16, 32], the config asks for [32, 32]"),
        ({"intermediate_size": 65}, "proj.weight' has shape"),
        ({"num_key_value_heads": 4}, "proj.weight' has shape [16, 32], the config asks for [32,"),
    ],
)
def test_sizes_that_differ_are_refused_before_anything_is_read(
    tmp_path, change, tensor, monkeypatch
):
    folder = hf_folder(tmp_path / "m", CONFIG | change, tensors(), tokenizer=False)
    monkeypatch.setattr("jaxinfer.io.weights.aligned_empty", None)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="disagree") as caught:
        load_checkpoint(folder, "float32")
    assert tensor in str(caught.value)


@pytest.mark.parametrize(
    ("config", "beside", "ends"),
    [
        (7, None, (7,)),
        ([7, 9], None, (7, 9)),
        (7, {"eos_token_id": 63}, (63,)),
        (None, {"eos_token_id": [63, 5, 63]}, (63, 5)),
        (None, None, ()),
        (7, {"eos_token_id": [63, -1, 4000]}, (63,)),
        (7, {"temperature": 0.5}, ()),
        (7, {"eos_token_id": None}, ()),
    ],
)
@pytest.mark.filterwarnings("ignore:.*has no tokenizer")
def test_the_ids_that_end_a_text_are_those_of_transformers(tmp_path, config, beside, ends, recwarn):
    """Checked against `from_pretrained(...).generation_config` of transformers 5.23."""
    settings = {k: v for k, v in CONFIG.items() if k != "eos_token_id"}
    settings |= {} if config is None else {"eos_token_id": config}
    folder = hf_folder(tmp_path / "m", settings, tensors(), tokenizer=False)
    if beside is not None:
        (folder / "generation_config.json").write_text(json.dumps(beside))
    assert load_checkpoint(folder, "float32").config.eos_token_ids == ends
    said = [w for w in recwarn if "names no eos_token_id" in str(w.message)]
    assert len(said) == (ends == () and config is not None)


def test_ends_of_a_turn_and_of_a_message_end_a_text_of_a_gguf_file(tmp_path):
    writer = gguf_writer(tmp_path / "m.gguf")
    writer.add_eot_token_id(3)
    writer.add_uint32("tokenizer.ggml.eom_token_id", 4)
    finish(writer)
    found = load_checkpoint(tmp_path / "m.gguf", "float32")
    assert set(found.config.eos_token_ids) >= {258, 3, 4}
    assert found.tokenizer is not None
    assert set(found.tokenizer.eos_token_ids) >= {258, 3, 4}


def split(folder: Path, count: int = 3) -> list[Path]:
    """The tiny GGUF model in parts, as llama.cpp names and numbers them."""
    whole = GGUFFile(gguf_file(folder / "whole.gguf"))
    names = np.array_split(sorted(whole.tensors), count)
    paths = [folder / f"m-{n + 1:05}-of-{count:05}.gguf" for n in range(count)]
    for number, (path, part) in enumerate(zip(paths, names, strict=True)):
        writer = gguf_writer(path) if number == 0 else gguf.GGUFWriter(path, "llama")
        if number == 0:
            writer.tensors[0].clear()
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(whole.tensors))
        for name in part:
            writer.add_tensor(str(name), whole.raw(str(name)))
        finish(writer)
    return paths


@pytest.mark.parametrize("given", [0, 2])
def test_the_parts_of_a_split_gguf_are_joined(tmp_path, given):
    from test_safetensors import same

    paths = split(tmp_path)
    left = load_checkpoint(paths[given], "float32")
    right = load_checkpoint(tmp_path / "whole.gguf", "float32")
    same(left.params, right.params)
    assert left.config == right.config


def test_converting_a_split_gguf_records_the_hash_of_every_part(tmp_path):
    paths = split(tmp_path)
    record = json.loads((convert(paths[1], tmp_path / "new") / "provenance.json").read_text())
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    assert record["source_sha256"] == hashes


def test_a_missing_part_is_named(tmp_path):
    paths = split(tmp_path)
    paths[1].unlink()
    message = r"part 1 of 3 of a split GGUF; part 2 \('m-00002-of-00003.gguf'\) is missing"
    with pytest.raises(ValueError, match=message):
        load_checkpoint(paths[0], "float32")


def test_a_part_under_another_name_is_refused(tmp_path):
    paths = split(tmp_path)
    shutil.copy(paths[0], tmp_path / "model.gguf")
    with pytest.raises(ValueError, match="part 1 of 3 of a split GGUF; name the parts"):
        load_checkpoint(tmp_path / "model.gguf", "float32")
    shutil.copy(paths[0], paths[1])
    with pytest.raises(ValueError, match="says it is part 1 of 3, expected part 2 of 3"):
        load_checkpoint(paths[0], "float32")


@pytest.mark.parametrize(
    ("kind", "settings", "near"),
    [
        ("gemma3_text", (), "llama"),
        ("qwen3_moe", (), "qwen3"),
        ("lama", (), "llama"),
        ("mixtral", (), "mistral"),
        ("gptj", (), "gpt_neox"),
        ("mystery", ("n_embd",), "gpt2"),
        ("mystery", ("rms_norm_eps",), "llama"),
    ],
)
def test_an_unknown_family_says_its_nearest(kind, settings, near):
    with pytest.raises(ValueError, match=f"'{kind}' is not implemented; .* closest .* is {near}$"):
        family_for(kind, settings)


@pytest.mark.parametrize("name", ["gemma3", "phi3"])
def test_an_unknown_architecture_of_gguf_says_its_nearest(tmp_path, name):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", name)
    writer.add_tensor("token_embd.weight", np.ones((2, 2), np.float32))
    finish(writer)
    with pytest.raises(ValueError, match=f"'{name}' is not .* closest supported family is llama$"):
        load_checkpoint(tmp_path / "m.gguf", "float32")
