"""Builders of broken checkpoints: each returns a function from a folder to the broken source."""

import json
import struct
from pathlib import Path

import gguf
import numpy as np
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

from jaxinfer.io.checkpoint import Checkpoint, save_checkpoint
from jaxinfer.io.load import load_checkpoint

Q_NAME = "model.layers.0.self_attn.q_proj.weight"


def header_with(change):
    """A one-tensor safetensors header with a change, as the weights of a folder."""

    def build(path: Path) -> Path:
        folder = hf_folder(path / "m")
        header = {"t": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}
        change(header)
        raw_safetensors(folder / "model.safetensors", header, bytes(16))
        return folder

    return build


def weights(change):
    def build(path: Path) -> Path:
        weights = tensors()
        change(weights)
        return hf_folder(path / "m", weights=weights)

    return build


def config(**changes):
    def build(path: Path) -> Path:
        return hf_folder(path / "m", CONFIG | changes, tensors())

    return build


def replaced(name: str, content: bytes):
    """A good folder with one file replaced."""

    def build(path: Path) -> Path:
        folder = hf_folder(path / "m")
        (folder / name).write_bytes(content)
        return folder

    return build


def truncated(path: Path) -> Path:
    folder = hf_folder(path / "m")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return folder


def announced(length: int):
    def build(path: Path) -> Path:
        folder = hf_folder(path / "m")
        raw_safetensors(folder / "model.safetensors", {}, length=length)
        return folder

    return build


def shard(change):
    def build(path: Path) -> Path:
        folder = sharded_folder(path / "m")
        index = folder / "model.safetensors.index.json"
        data = json.loads(index.read_text())
        change(data["weight_map"])
        index.write_text(json.dumps(data))
        return folder

    return build


def without_weights(path: Path) -> Path:
    folder = hf_folder(path / "m")
    (folder / "model.safetensors").unlink()
    return folder


def pickle(path: Path) -> Path:
    folder = without_weights(path)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    return folder


def put(name, value):
    return lambda mapping: mapping.__setitem__(name, value)


def nan(weights):
    weights[Q_NAME][3, 3] = np.nan


def gguf_bytes(change):
    """A good GGUF file with its bytes changed."""

    def build(path: Path) -> Path:
        file = gguf_file(path / "m.gguf")
        data = bytearray(file.read_bytes())
        file.write_bytes(bytes(change(data) or data))
        return file

    return build


def pack(form: str, offset: int, value: int):
    return lambda data: struct.pack_into(form, data, offset, value)


def gguf_key(key: bytes, form: str, value: int):
    """Overwrite the number behind a metadata key."""

    def change(data: bytearray):
        struct.pack_into(form, data, data.index(key) + len(key) + 4, value)

    return gguf_bytes(change)


def gguf_tensor(name: bytes, form: str, skip: int, value: int):
    """Overwrite a number of a tensor's entry: rank at 0, dimensions at 4, ..."""

    def change(data: bytearray):
        struct.pack_into(form, data, data.index(name) + len(name) + skip, value)

    return gguf_bytes(change)


def gguf_written(change):
    def build(path: Path) -> Path:
        writer = gguf_writer(path / "m.gguf")
        change(writer)
        finish(writer)
        return path / "m.gguf"

    return build


def gguf_architecture(path: Path) -> Path:
    writer = gguf.GGUFWriter(path / "m.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    finish(writer)
    return path / "m.gguf"


def gguf_nan(path: Path) -> Path:
    file = gguf_file(path / "m.gguf")
    data = bytearray(file.read_bytes())
    data[-4:] = struct.pack("<f", np.inf)
    file.write_bytes(data)
    return file


def ours(change):
    """A folder of our format, damaged."""

    def build(path: Path) -> Path:
        good = load_checkpoint(hf_folder(path / "hf"), "float32")
        save_checkpoint(path / "m", Checkpoint(good.config, good.params, good.tokenizer))
        change(path / "m")
        return path / "m"

    return build


def edited(change):
    def edit(folder: Path) -> None:
        data = json.loads((folder / "config.json").read_text())
        change(data)
        (folder / "config.json").write_text(json.dumps(data))

    return edit


def own_model(**changes):
    """A folder of our format with other fields in its model config."""
    return ours(edited(lambda data: data["model"].update(changes)))


def add_llama3(writer) -> None:
    """Divisors of a context eight times as long."""
    wave = 2 * np.pi * 10000.0 ** (np.arange(4) / 4)
    blend = np.clip((8192 / wave - 1) / 3, 0, 1)
    writer.add_tensor("rope_freqs.weight", (1 / ((1 - blend) / 8 + blend)).astype(np.float32))


def remove_chunk(folder: Path) -> None:
    (folder / "params" / "layers.0.attn.q.weight" / "0.0").unlink()


def cut_chunk(folder: Path) -> None:
    chunk = folder / "params" / "layers.0.attn.q.weight" / "0.0"
    chunk.write_bytes(chunk.read_bytes()[:10])


def remove_array(folder: Path) -> None:
    for file in (folder / "params" / "final_norm.scale").iterdir():
        file.unlink()


def text_file(name: str, text: str):
    def build(path: Path) -> Path:
        (path / name).write_text(text)
        return path / name

    return build


def empty_folder(path: Path) -> Path:
    (path / "m").mkdir()
    return path / "m"


FORTY = "[" * 100_000
