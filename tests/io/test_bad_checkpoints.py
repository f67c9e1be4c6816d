"""Broken input of every kind: one clear line that names the culprit, in bounded time."""

import struct
import time

import numpy as np
import pytest
from broken_checkpoints import (
    FORTY,
    Q_NAME,
    add_llama3,
    announced,
    config,
    cut_chunk,
    edited,
    empty_folder,
    gguf_architecture,
    gguf_bytes,
    gguf_key,
    gguf_nan,
    gguf_tensor,
    gguf_written,
    header_with,
    nan,
    ours,
    own_model,
    pack,
    pickle,
    put,
    remove_array,
    remove_chunk,
    replaced,
    shard,
    text_file,
    truncated,
    weights,
    without_weights,
)
from tiny_checkpoints import hf_folder, tensors

from jaxinfer.io.load import load_checkpoint

CASES = {
    # safetensors headers
    "header length beyond the file": (announced(2**40), "header length is 1099511627776"),
    "header length of all ones": (announced(2**64 - 1), "header length"),
    "header length zero": (announced(0), "header length is 0"),
    "safetensors file of three bytes": (replaced("model.safetensors", b"abc"), "header length"),
    "safetensors file that is empty": (replaced("model.safetensors", b""), "header length"),
    "header that is not JSON": (
        replaced("model.safetensors", b"\x04" + bytes(7) + b"{{{{"),
        "JSON",
    ),
    "header that is a list": (
        replaced("model.safetensors", b"\x02" + bytes(7) + b"[]"),
        "object",
    ),
    "header nested too deep": (
        replaced("model.safetensors", struct.pack("<Q", len(FORTY)) + FORTY.encode()),
        "JSON",
    ),
    "offsets beyond the file": (
        header_with(lambda h: h["t"].update(data_offsets=[0, 2**50], shape=[2**48])),
        "'t' ends at byte",
    ),
    "offsets backwards": (header_with(lambda h: h["t"].update(data_offsets=[16, 0])), "offsets"),
    "offsets negative": (header_with(lambda h: h["t"].update(data_offsets=[-16, 0])), "offsets"),
    "offsets of text": (header_with(lambda h: h["t"].update(data_offsets="0,16")), "offsets"),
    "shape larger than its bytes": (header_with(lambda h: h["t"].update(shape=[4, 4])), "64 bytes"),
    "shape negative": (header_with(lambda h: h["t"].update(shape=[-2, -2])), "shape [-2, -2]"),
    "shape of floats": (header_with(lambda h: h["t"].update(shape=[2.0, 2])), "shape [2.0, 2]"),
    "shape that overflows": (header_with(lambda h: h["t"].update(shape=[2**60] * 8)), "bytes"),
    "tensors that overlap": (header_with(lambda h: h.update(u=dict(h["t"]))), "overlap"),
    "dtype unknown": (header_with(lambda h: h["t"].update(dtype="F1")), "unknown dtype 'F1'"),
    "description missing": (header_with(put("t", None)), "'t' has no description"),
    "file cut short": (truncated, "is the download complete?"),
    # weights
    "tensor missing": (weights(lambda w: w.pop(Q_NAME)), "lacks tensor"),
    "tensor of a wrong shape": (weights(put(Q_NAME, np.ones((8, 32), np.float32))), Q_NAME),
    "tensor of integers": (weights(put(Q_NAME, np.ones((32, 32), np.int8))), "dtype I8"),
    "tensor with NaN": (weights(nan), f"{Q_NAME}' holds non-finite values"),
    "tensor that is empty": (weights(put(Q_NAME, np.ones((0, 32), np.float32))), Q_NAME),
    "weights missing": (without_weights, "has no weights"),
    "weights pickled": (pickle, "PyTorch pickles (pytorch_model.bin)"),
    # shards
    "shard outside the folder": (
        shard(put(Q_NAME, "../../etc/x.safetensors")),
        "expected the",
    ),
    "shard with an absolute path": (
        shard(put(Q_NAME, "/etc/x.safetensors")),
        "expected the",
    ),
    "shard that is a number": (shard(put(Q_NAME, 3)), "is placed in 3"),
    "shard missing": (
        shard(put(Q_NAME, "c.safetensors")),
        "'c.safetensors', which is missing",
    ),
    "shard without its tensor": (
        shard(put("ghost", "a.safetensors")),
        "lacks tensor 'ghost'",
    ),
    "index without tensors": (shard(lambda m: m.clear()), "lacks a 'weight_map'"),
    # configs
    "config missing": (empty_folder, "has no config.json"),
    "config cut short": (
        replaced("config.json", b'{"model_type": "lla'),
        "config.json is not valid",
    ),
    "config that is binary": (replaced("config.json", b"\xff\xfe\x00"), "not UTF-8"),
    "config that is a list": (replaced("config.json", b"[1]"), "expected an object"),
    "config without model type": (replaced("config.json", b"{}"), "model_type"),
    "config of an unknown model": (config(model_type="mystery"), "mystery"),
    "config with a huge vocabulary": (
        config(vocab_size=2**31 - 1, hidden_size=2**20),
        "config",
    ),
    "config with text for a number": (config(hidden_size="32"), "hidden_size"),
    "config with no layers": (config(num_hidden_layers=0), "num_hidden_layers"),
    "config with too many layers": (config(num_hidden_layers=3), "model.layers.2"),
    "config with odd heads": (config(num_attention_heads=3), "3"),
    "config with a negative epsilon": (config(rms_norm_eps=-1.0), "rms_norm_eps"),
    "generation config with text": (
        replaced("generation_config.json", b'{"eos_token_id": "two"}'),
        "eos_token_id must be ids",
    ),
    # tokenizers
    "tokenizer cut short": (replaced("tokenizer.json", b'{"version": "1.0"'), "tokenizer.json"),
    "tokenizer config with a list": (replaced("tokenizer_config.json", b"[]"), "an object"),
    "special token that is a number": (
        replaced("tokenizer_config.json", b'{"eos_token": 7}'),
        "eos_token must be a text",
    ),
    "chat template that is a number": (
        replaced("tokenizer_config.json", b'{"chat_template": 7}'),
        "chat_template must be a text",
    ),
    # GGUF
    "gguf of another format": (text_file("m.gguf", "hello world, this is text"), "not a GGUF"),
    "gguf that is empty": (text_file("m.gguf", ""), "not a GGUF file"),
    "gguf of version 9": (gguf_bytes(pack("<I", 4, 9)), "version is 9"),
    "gguf of the other byte order": (gguf_bytes(pack(">I", 4, 3)), "little endian"),
    "gguf with 2^60 tensors": (gguf_bytes(pack("<Q", 8, 2**60)), "tensor entries"),
    "gguf with 2^60 fields": (gguf_bytes(pack("<Q", 16, 2**60)), "metadata entries"),
    "gguf with a key of 2^50 bytes": (gguf_bytes(pack("<Q", 24, 2**50)), "metadata key"),
    "gguf with a field of an unknown type": (
        gguf_bytes(lambda d: pack("<I", d.index(b"block_count") + 11, 77)(d)),
        "'llama.block_count' has unknown type 77",
    ),
    "gguf without its context length": (
        gguf_bytes(lambda d: d.replace(b"llama.context_length", b"llama.context_lengtX")),
        "'llama.context_length' is missing",
    ),
    "gguf with more layers than tensors": (
        gguf_key(b"llama.block_count", "<I", 77),
        "'llama.block_count' is 77, but there is no tensor of block 76",
    ),
    "gguf with a list of 2^61 texts": (
        gguf_bytes(lambda d: pack("<Q", d.index(b"ggml.tokens") + 19, 2**61)(d)),
        "tokenizer.ggml.tokens' text entries",
    ),
    "gguf cut in its header": (gguf_bytes(lambda d: d[:500]), "m.gguf"),
    "gguf cut in its data": (gguf_bytes(lambda d: d[:-100]), "is the download complete?"),
    "gguf tensor of rank 1000": (
        gguf_tensor(b"token_embd.weight", "<I", 0, 1000),
        "1000 dimensions",
    ),
    "gguf tensor of 2^60 rows": (
        gguf_tensor(b"token_embd.weight", "<Q", 12, 2**60),
        "token_embd.weight",
    ),
    "gguf tensor without rows": (
        gguf_tensor(b"token_embd.weight", "<Q", 12, 0),
        "'token_embd.weight' is empty",
    ),
    "gguf tensor of an unknown type": (
        gguf_tensor(b"token_embd.weight", "<I", 20, 999),
        "unknown type 999",
    ),
    "gguf tensor of integers": (
        gguf_tensor(b"output_norm.weight", "<I", 12, 26),
        "type I32, which cannot be dequantized",
    ),
    "gguf tensor far away": (
        gguf_tensor(b"token_embd.weight", "<Q", 24, 2**40),
        "'token_embd.weight' ends at",
    ),
    "gguf tensors that overlap": (
        gguf_tensor(b"blk.0.attn_norm.weight", "<Q", 16, 0),
        "overlap",
    ),
    "gguf with infinity": (gguf_nan, "non-finite"),
    "gguf of an unknown model": (gguf_architecture, "architecture 'mamba'"),
    "gguf without layers": (gguf_key(b"llama.block_count", "<I", 0), "block_count' is 0"),
    "gguf with experts": (gguf_written(lambda w: w.add_expert_count(8)), "mixture-of-experts"),
    "gguf with strange rope divisors": (
        gguf_written(lambda w: w.add_tensor("rope_freqs.weight", np.arange(1, 5, dtype="f4"))),
        "rope_freqs.weight",
    ),
    "gguf with an unknown attention factor": (
        gguf_written(lambda w: w.add_rope_scaling_attn_factors(2.0)),
        "rope.scaling.attn_factor' is 2.0, expected 1",
    ),
    "gguf with two rope scalings": (
        gguf_written(lambda w: [w.add_rope_scaling_factor(2.0), add_llama3(w)]),
        "rope.scaling.factor' is 2.0, expected 1 beside",
    ),
    "gguf with half of each head rotated": (
        gguf_written(lambda w: w.add_rope_dimension_count(4)),
        "partial rotation (0.5)",
    ),
    "gguf with a bos beyond its tokens": (
        gguf_key(b"tokenizer.ggml.bos_token_id", "<I", 4000),
        "bos_token_id is 4000",
    ),
    # our own folders
    "own folder of a later version": (
        ours(edited(put("format_version", 99))),
        "format version 99",
    ),
    "own folder with another width": (
        ours(edited(lambda d: d["model"].update(hidden_size=64))),
        "config.json says float32[",
    ),
    "own folder with an unknown field": (
        ours(edited(lambda d: d["model"].update(magic=1))),
        "unknown config fields ['magic']",
    ),
    "own folder of an unknown family": (own_model(family="nope"), "'nope' is not implemented"),
    "own folder with an unknown activation": (
        own_model(activation="tanh"),
        "activation must be one of 'silu', 'gelu', 'gelu_tanh', 'relu', 'identity', got 'tanh'",
    ),
    "own folder with an unknown norm": (
        own_model(norm="foo"),
        "norm must be one of 'rms', 'rms_outside', 'layer'",
    ),
    "own folder with text for an epsilon": (
        own_model(norm_eps="x"),
        "norm_eps must be a finite number, got 'x'",
    ),
    "own folder with text for a scale": (
        own_model(attention_scale="x"),
        "attention_scale must be a finite number or null, got 'x'",
    ),
    "own folder with text for a token": (
        own_model(bos_token_id="z"),
        "bos_token_id must be a 32-bit integer or null, got 'z'",
    ),
    "own folder with a token beyond its vocabulary": (
        own_model(eos_token_ids=[260]),
        "must lie in the vocabulary of 260, got 260",
    ),
    "own folder with text for a flag": (
        own_model(tie_embeddings="no"),
        "tie_embeddings must be true or false, got 'no'",
    ),
    "own folder with windows of half tokens": (
        own_model(sliding_windows=[7.5, None]),
        "sliding_windows must be a list of (a 32-bit integer or null) or null, got (7.5, None)",
    ),
    "own folder with a rope that is a number": (own_model(rope=3), "RopeConfig must be an object"),
    "own folder without its sizes": (
        ours(edited(lambda d: d["model"].pop("num_layers"))),
        "config fields ['num_layers'] are missing",
    ),
    "own folder with another dtype": (
        ours(edited(put("dtype", "int8"))),
        "unknown dtype 'int8'",
    ),
    "own folder with a lost chunk": (ours(remove_chunk), "layers.0.attn.q.weight"),
    "own folder with a short chunk": (ours(cut_chunk), "layers.0.attn.q.weight"),
    "own folder with a lost array": (ours(remove_array), "final_norm.scale"),
    # sources
    "a path that does not exist": (lambda path: path / "nothing", "no model"),
    "a pickle file": (text_file("model.bin", "x"), "PyTorch pickle"),
    "one safetensors file": (text_file("model.safetensors", "x"), "one file of a Hugging Face"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_broken_input_gives_one_line_that_names_the_culprit(tmp_path, case):
    build, expected = CASES[case]
    source = build(tmp_path)
    start = time.monotonic()
    with pytest.raises(ValueError) as caught:
        load_checkpoint(source, "float32")
    message = str(caught.value)
    assert "\n" not in message
    assert any(part in message for part in expected.split("|")), message
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "source", ["", "a\0b", "~nobody/m", "x" * 10_000, "https://huggingface.co/gpt2"]
)
def test_a_source_that_is_no_path_gives_one_line(source):
    with pytest.raises(ValueError) as caught:
        load_checkpoint(source, "float32")
    assert "\n" not in str(caught.value)


def test_an_unknown_dtype_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="unknown dtype 'int8'; use one of float32"):
        load_checkpoint(hf_folder(tmp_path / "m"), "int8")


def test_values_beyond_float16_are_refused_by_name(tmp_path):
    weights = tensors()
    weights["model.norm.weight"][:] = 1e6
    with pytest.raises(ValueError, match="'model.norm.weight' holds values outside .* float16"):
        load_checkpoint(hf_folder(tmp_path / "m", weights=weights), "float16")
