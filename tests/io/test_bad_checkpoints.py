"""Broken input of every kind: one clear line that names the culprit, in bounded time and memory."""

import json
import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tiny_checkpoints import (
    CONFIG,
    finish,
    gguf_file,
    gguf_writer,
    hf_folder,
    raw_safetensors,
    sharded_folder,
    tensors,
)

from jaxinfer.io import gguf_header, safetensors_reader
from jaxinfer.io.checkpoint import Checkpoint, save_checkpoint
from jaxinfer.io.load import load_checkpoint

Q_NAME = "model.layers.0.self_attn.q_proj.weight"


def _header(change):
    """A one-tensor safetensors header with a change, as the weights of a folder."""

    def build(path: Path) -> Path:
        folder = hf_folder(path / "m")
        header = {"t": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}
        change(header)
        raw_safetensors(folder / "model.safetensors", header, bytes(16))
        return folder

    return build


def _weights(change):
    def build(path: Path) -> Path:
        weights = tensors()
        change(weights)
        return hf_folder(path / "m", weights=weights)

    return build


def _config(**changes):
    def build(path: Path) -> Path:
        return hf_folder(path / "m", CONFIG | changes, tensors())

    return build


def _bytes(name: str, content: bytes):
    """A good folder with one file replaced."""

    def build(path: Path) -> Path:
        folder = hf_folder(path / "m")
        (folder / name).write_bytes(content)
        return folder

    return build


def _truncated(path: Path) -> Path:
    folder = hf_folder(path / "m")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return folder


def _length(length: int):
    def build(path: Path) -> Path:
        folder = hf_folder(path / "m")
        raw_safetensors(folder / "model.safetensors", {}, length=length)
        return folder

    return build


def _shard(change):
    def build(path: Path) -> Path:
        folder = sharded_folder(path / "m")
        index = folder / "model.safetensors.index.json"
        data = json.loads(index.read_text())
        change(data["weight_map"])
        index.write_text(json.dumps(data))
        return folder

    return build


def _without_weights(path: Path) -> Path:
    folder = hf_folder(path / "m")
    (folder / "model.safetensors").unlink()
    return folder


def _pickle(path: Path) -> Path:
    folder = _without_weights(path)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    return folder


def _set(name, value):
    return lambda mapping: mapping.__setitem__(name, value)


def _nan(weights):
    weights[Q_NAME][3, 3] = np.nan


def _gguf_bytes(change):
    """A good GGUF file with its bytes changed."""

    def build(path: Path) -> Path:
        file = gguf_file(path / "m.gguf")
        data = bytearray(file.read_bytes())
        file.write_bytes(bytes(change(data) or data))
        return file

    return build


def _pack(form: str, offset: int, value: int):
    return lambda data: struct.pack_into(form, data, offset, value)


def _gguf_key(key: bytes, form: str, value: int):
    """Overwrite the number behind a metadata key."""

    def change(data: bytearray):
        struct.pack_into(form, data, data.index(key) + len(key) + 4, value)

    return _gguf_bytes(change)


def _gguf_tensor(name: bytes, form: str, skip: int, value: int):
    """Overwrite a number of a tensor's entry: rank at 0, dimensions at 4, ..."""

    def change(data: bytearray):
        struct.pack_into(form, data, data.index(name) + len(name) + skip, value)

    return _gguf_bytes(change)


def _gguf_written(change):
    def build(path: Path) -> Path:
        writer = gguf_writer(path / "m.gguf")
        change(writer)
        finish(writer)
        return path / "m.gguf"

    return build


def _gguf_architecture(path: Path) -> Path:
    writer = gguf.GGUFWriter(path / "m.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    finish(writer)
    return path / "m.gguf"


def _gguf_nan(path: Path) -> Path:
    file = gguf_file(path / "m.gguf")
    data = bytearray(file.read_bytes())
    data[-4:] = struct.pack("<f", np.inf)
    file.write_bytes(data)
    return file


def _ours(change):
    """A folder of our format, damaged."""

    def build(path: Path) -> Path:
        good = load_checkpoint(hf_folder(path / "hf"), "float32")
        save_checkpoint(path / "m", Checkpoint(good.config, good.params, good.tokenizer))
        change(path / "m")
        return path / "m"

    return build


def _edit(change):
    def edit(folder: Path) -> None:
        data = json.loads((folder / "config.json").read_text())
        change(data)
        (folder / "config.json").write_text(json.dumps(data))

    return edit


def _remove_chunk(folder: Path) -> None:
    (folder / "params" / "layers.0.attn.q.kernel" / "0.0").unlink()


def _cut_chunk(folder: Path) -> None:
    chunk = folder / "params" / "layers.0.attn.q.kernel" / "0.0"
    chunk.write_bytes(chunk.read_bytes()[:10])


def _remove_array(folder: Path) -> None:
    for file in (folder / "params" / "final_norm.scale").iterdir():
        file.unlink()


def _text_file(name: str, text: str):
    def build(path: Path) -> Path:
        (path / name).write_text(text)
        return path / name

    return build


def _empty_folder(path: Path) -> Path:
    (path / "m").mkdir()
    return path / "m"


FORTY = "[" * 100_000
CASES = {
    # safetensors headers
    "header length beyond the file": (_length(2**40), "header length is 1099511627776"),
    "header length of all ones": (_length(2**64 - 1), "header length"),
    "header length zero": (_length(0), "header length is 0"),
    "safetensors file of three bytes": (_bytes("model.safetensors", b"abc"), "header length"),
    "safetensors file that is empty": (_bytes("model.safetensors", b""), "header length"),
    "header that is not JSON": (_bytes("model.safetensors", b"\x04" + bytes(7) + b"{{{{"), "JSON"),
    "header that is a list": (_bytes("model.safetensors", b"\x02" + bytes(7) + b"[]"), "object"),
    "header nested too deep": (
        _bytes("model.safetensors", struct.pack("<Q", len(FORTY)) + FORTY.encode()),
        "JSON",
    ),
    "offsets beyond the file": (
        _header(lambda h: h["t"].update(data_offsets=[0, 2**50], shape=[2**48])),
        "'t' ends at byte",
    ),
    "offsets backwards": (_header(lambda h: h["t"].update(data_offsets=[16, 0])), "offsets"),
    "offsets negative": (_header(lambda h: h["t"].update(data_offsets=[-16, 0])), "offsets"),
    "offsets of text": (_header(lambda h: h["t"].update(data_offsets="0,16")), "offsets"),
    "shape larger than its bytes": (_header(lambda h: h["t"].update(shape=[4, 4])), "64 bytes"),
    "shape negative": (_header(lambda h: h["t"].update(shape=[-2, -2])), "shape [-2, -2]"),
    "shape of floats": (_header(lambda h: h["t"].update(shape=[2.0, 2])), "shape [2.0, 2]"),
    "shape that overflows": (_header(lambda h: h["t"].update(shape=[2**60] * 8)), "bytes"),
    "tensors that overlap": (_header(lambda h: h.update(u=dict(h["t"]))), "overlap"),
    "dtype unknown": (_header(lambda h: h["t"].update(dtype="F1")), "unknown dtype 'F1'"),
    "description missing": (_header(_set("t", None)), "'t' has no description"),
    "file cut short": (_truncated, "is the download complete?"),
    # weights
    "tensor missing": (_weights(lambda w: w.pop(Q_NAME)), "lacks tensor"),
    "tensor of a wrong shape": (_weights(_set(Q_NAME, np.ones((8, 32), np.float32))), Q_NAME),
    "tensor of integers": (_weights(_set(Q_NAME, np.ones((32, 32), np.int8))), "dtype I8"),
    "tensor with NaN": (_weights(_nan), f"{Q_NAME}' holds non-finite values"),
    "tensor that is empty": (_weights(_set(Q_NAME, np.ones((0, 32), np.float32))), Q_NAME),
    "weights missing": (_without_weights, "has no weights"),
    "weights pickled": (_pickle, "PyTorch pickles (pytorch_model.bin)"),
    # shards
    "shard outside the folder": (_shard(_set(Q_NAME, "../../etc/x.safetensors")), "expected the"),
    "shard with an absolute path": (_shard(_set(Q_NAME, "/etc/x.safetensors")), "expected the"),
    "shard that is a number": (_shard(_set(Q_NAME, 3)), "is placed in 3"),
    "shard missing": (_shard(_set(Q_NAME, "c.safetensors")), "'c.safetensors', which is missing"),
    "shard without its tensor": (_shard(_set("ghost", "a.safetensors")), "lacks tensor 'ghost'"),
    "index without tensors": (_shard(lambda m: m.clear()), "lacks a 'weight_map'"),
    # configs
    "config missing": (_empty_folder, "has no config.json"),
    "config cut short": (_bytes("config.json", b'{"model_type": "lla'), "config.json is not valid"),
    "config that is binary": (_bytes("config.json", b"\xff\xfe\x00"), "not UTF-8"),
    "config that is a list": (_bytes("config.json", b"[1]"), "expected an object"),
    "config without model type": (_bytes("config.json", b"{}"), "model_type"),
    "config of an unknown model": (_config(model_type="mystery"), "mystery"),
    "config with a huge vocabulary": (_config(vocab_size=2**31 - 1, hidden_size=2**20), "config"),
    "config with text for a number": (_config(hidden_size="32"), "hidden_size"),
    "config with no layers": (_config(num_hidden_layers=0), "num_hidden_layers"),
    "config with too many layers": (_config(num_hidden_layers=3), "model.layers.2"),
    "config with odd heads": (_config(num_attention_heads=3), "3"),
    "config with a negative epsilon": (_config(rms_norm_eps=-1.0), "rms_norm_eps"),
    "generation config with text": (
        _bytes("generation_config.json", b'{"eos_token_id": "two"}'),
        "eos_token_id must be ids",
    ),
    # tokenizers
    "tokenizer cut short": (_bytes("tokenizer.json", b'{"version": "1.0"'), "tokenizer.json"),
    "tokenizer config with a list": (_bytes("tokenizer_config.json", b"[]"), "an object"),
    "special token that is a number": (
        _bytes("tokenizer_config.json", b'{"eos_token": 7}'),
        "eos_token must be a text",
    ),
    "chat template that is a number": (
        _bytes("tokenizer_config.json", b'{"chat_template": 7}'),
        "chat_template must be a text",
    ),
    # GGUF
    "gguf of another format": (_text_file("m.gguf", "hello world, this is text"), "not a GGUF"),
    "gguf that is empty": (_text_file("m.gguf", ""), "not a GGUF file"),
    "gguf of version 9": (_gguf_bytes(_pack("<I", 4, 9)), "version is 9"),
    "gguf of the other byte order": (_gguf_bytes(_pack(">I", 4, 3)), "little endian"),
    "gguf with 2^60 tensors": (_gguf_bytes(_pack("<Q", 8, 2**60)), "tensor entries"),
    "gguf with 2^60 fields": (_gguf_bytes(_pack("<Q", 16, 2**60)), "metadata entries"),
    "gguf with a key of 2^50 bytes": (_gguf_bytes(_pack("<Q", 24, 2**50)), "metadata key"),
    "gguf with a field of an unknown type": (
        _gguf_bytes(lambda d: _pack("<I", d.index(b"block_count") + 11, 77)(d)),
        "'llama.block_count' has unknown type 77",
    ),
    "gguf without its context length": (
        _gguf_bytes(lambda d: d.replace(b"llama.context_length", b"llama.context_lengtX")),
        "'llama.context_length' is missing",
    ),
    "gguf with more layers than tensors": (
        _gguf_key(b"llama.block_count", "<I", 77),
        "layers.2.",
    ),
    "gguf with a list of 2^61 texts": (
        _gguf_bytes(lambda d: _pack("<Q", d.index(b"ggml.tokens") + 19, 2**61)(d)),
        "tokenizer.ggml.tokens' text entries",
    ),
    "gguf cut in its header": (_gguf_bytes(lambda d: d[:500]), "m.gguf"),
    "gguf cut in its data": (_gguf_bytes(lambda d: d[:-100]), "is the download complete?"),
    "gguf tensor of rank 1000": (
        _gguf_tensor(b"token_embd.weight", "<I", 0, 1000),
        "1000 dimensions",
    ),
    "gguf tensor of 2^60 rows": (
        _gguf_tensor(b"token_embd.weight", "<Q", 12, 2**60),
        "token_embd.weight",
    ),
    "gguf tensor without rows": (
        _gguf_tensor(b"token_embd.weight", "<Q", 12, 0),
        "'token_embd.weight' is empty",
    ),
    "gguf tensor of an unknown type": (
        _gguf_tensor(b"token_embd.weight", "<I", 20, 999),
        "unknown type 999",
    ),
    "gguf tensor of integers": (
        _gguf_tensor(b"output_norm.weight", "<I", 12, 26),
        "type I32, which cannot be dequantized",
    ),
    "gguf tensor far away": (
        _gguf_tensor(b"token_embd.weight", "<Q", 24, 2**40),
        "'token_embd.weight' ends at",
    ),
    "gguf tensors that overlap": (
        _gguf_tensor(b"blk.0.attn_norm.weight", "<Q", 16, 0),
        "overlap",
    ),
    "gguf with infinity": (_gguf_nan, "non-finite"),
    "gguf of an unknown model": (_gguf_architecture, "architecture 'mamba'"),
    "gguf without layers": (_gguf_key(b"llama.block_count", "<I", 0), "block_count' is 0"),
    "gguf with experts": (_gguf_written(lambda w: w.add_expert_count(8)), "mixture-of-experts"),
    "gguf with strange rope divisors": (
        _gguf_written(lambda w: w.add_tensor("rope_freqs.weight", np.arange(1, 5, dtype="f4"))),
        "rope_freqs.weight",
    ),
    "gguf with a bos beyond its tokens": (
        _gguf_key(b"tokenizer.ggml.bos_token_id", "<I", 4000),
        "bos_token_id is 4000",
    ),
    # our own folders
    "own folder of a later version": (
        _ours(_edit(_set("format_version", 99))),
        "format version 99",
    ),
    "own folder with another width": (
        _ours(_edit(lambda d: d["model"].update(hidden_size=64))),
        "config.json says float32[",
    ),
    "own folder with an unknown field": (
        _ours(_edit(lambda d: d["model"].update(magic=1))),
        "unknown config fields ['magic']",
    ),
    "own folder with another dtype": (_ours(_edit(_set("dtype", "int8"))), "unknown dtype 'int8'"),
    "own folder with a lost chunk": (_ours(_remove_chunk), "layers.0.attn.q.kernel"),
    "own folder with a short chunk": (_ours(_cut_chunk), "layers.0.attn.q.kernel"),
    "own folder with a lost array": (_ours(_remove_array), "final_norm.scale"),
    # sources
    "a path that does not exist": (lambda path: path / "nothing", "no model"),
    "a pickle file": (_text_file("model.bin", "x"), "PyTorch pickle"),
    "one safetensors file": (_text_file("model.safetensors", "x"), "one file of a Hugging Face"),
}


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


@pytest.mark.parametrize("source", ["", "a\0b", "x" * 10_000, "https://huggingface.co/gpt2"])
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


def mutated(data, draw):
    """`data` with some bytes changed, removed or repeated."""
    content = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(content) - 1, 0)))
        kind = draw(st.sampled_from(["set", "word", "cut", "remove", "repeat"]))
        if kind == "set":
            content[place : place + 1] = bytes([draw(st.integers(0, 255))])
        elif kind == "word":
            word = draw(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1]))
            content[place : place + 8] = struct.pack("<Q", word)
        elif kind == "cut":
            del content[place:]
        elif kind == "remove":
            del content[place : place + draw(st.integers(1, 16))]
        else:
            content[place:place] = content[place : place + draw(st.integers(1, 16))]
    return bytes(content)


@st.composite
def safetensors_bytes(draw):
    return mutated(SAFETENSORS, draw)


@st.composite
def gguf_bytes(draw):
    return mutated(GGUF, draw)


def _small_files() -> tuple[bytes, bytes]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        values = {"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)}
        save_file(values, Path(folder) / "m.safetensors")
        writer = gguf.GGUFWriter(Path(folder) / "m.gguf", "llama")
        writer.add_block_count(1)
        writer.add_token_list(["a", "b", "c"])
        writer.add_token_scores([1.0, 2.0, 3.0])
        writer.add_tensor("token_embd.weight", np.ones((3, 4), np.float32))
        writer.add_tensor("output_norm.weight", np.ones(4, np.float32))
        finish(writer)
        names = ("m.safetensors", "m.gguf")
        first, second = ((Path(folder) / name).read_bytes() for name in names)
        return first, second


SAFETENSORS, GGUF = _small_files()
FUZZ = settings(
    max_examples=300,
    deadline=2000,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@FUZZ
@given(data=safetensors_bytes())
def test_a_mutated_safetensors_header_is_read_or_refused(tmp_path, data):
    path = tmp_path / "m.safetensors"
    path.write_bytes(data)
    try:
        entries = safetensors_reader.read_header(path)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert all(0 <= e.start <= e.stop <= len(data) for e in entries.values())


@FUZZ
@given(data=gguf_bytes())
def test_a_mutated_gguf_header_is_read_or_refused(tmp_path, data):
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    try:
        header = gguf_header.read_header(path)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert all(t.offset + t.num_bytes <= len(data) for t in header.tensors.values())
