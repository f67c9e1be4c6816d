"""Forged weights: the formats' own rules, sizes before allocation, names that a terminal obeys."""

import json
import os
import struct
import tempfile
from pathlib import Path

import gguf
import numpy as np
import pytest
from broken_checkpoints import edited, header_with, ours, replaced
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from tiny_checkpoints import CONFIG, finish, gguf_writer, hf_folder, raw_safetensors, tensors

from jaxinfer.io import gguf_header, safetensors_header
from jaxinfer.io.load import load_checkpoint

Q = "layers.0.attn.q.weight"
HOSTILE = "x\x1b[2J\x1b]0;owned\x07\nnew line\u202e" + "y" * 5000


def header(text: bytes, data: int = 16):
    """The weights of a folder, with this header and so many zeros."""
    return replaced("model.safetensors", struct.pack("<Q", len(text)) + text + bytes(data))


def described(**changes):
    """A folder of our format with other fields in the description of an array."""

    def change(folder: Path) -> None:
        path = folder / "params" / Q / ".zarray"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return ours(change)


def stored(change):
    """A folder of our format with the file of an array changed."""
    return ours(lambda folder: change(folder / "params" / Q / "0.0"))


def put_nan(path: Path) -> None:
    values = np.fromfile(path, np.float32)
    values[7] = np.nan
    values.tofile(path)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def forged_vocabulary(folder: Path) -> None:
    edited(lambda data: data["model"].update(vocab_size=2**31 - 1))(folder)
    for name in ("embed.tokens", "head.weight"):
        path = folder / "params" / name / ".zarray"
        shape = [2**31 - 1, 32]
        path.write_text(
            json.dumps(json.loads(path.read_text()) | {"shape": shape, "chunks": shape})
        )


def gguf_array(kind: int, count: int, data: bytes = b""):
    """A file whose one metadata field is an array that announces `count` entries."""

    def build(folder: Path) -> Path:
        content = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a"
        content += struct.pack("<IIQ", 9, kind, count) + data
        (folder / "m.gguf").write_bytes(content)
        return folder / "m.gguf"

    return build


def aligned(number: int):
    """A good GGUF file that announces another alignment."""

    def build(folder: Path) -> Path:
        writer = gguf_writer(folder / "m.gguf")
        writer.add_custom_alignment(64)
        finish(writer)
        data, key = bytearray((folder / "m.gguf").read_bytes()), b"general.alignment"
        struct.pack_into("<I", data, data.index(key) + len(key) + 4, number)
        (folder / "m.gguf").write_bytes(data)
        return folder / "m.gguf"

    return build


T = b'"t":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}'
CASES = {
    "bytes after the last tensor": (header(b"{" + T + b"}", 20), "4 bytes after the last tensor"),
    "a hole before a tensor": (
        header_with(lambda h: h["t"].update(shape=[3], data_offsets=[4, 16])),
        "4 bytes before tensor 't'",
    ),
    "a name that occurs twice": (header(b"{" + T + b"," + T + b"}"), "'t' occurs twice"),
    "a field that occurs twice": (
        header(T.replace(b'"F32"', b'"F32","dtype":"F32"').join([b"{", b"}"])),
        "'dtype' occurs twice",
    ),
    "metadata twice": (
        header(b'{"__metadata__":{},"__metadata__":{},' + T + b"}"),
        "'__metadata__' occurs twice",
    ),
    "metadata of numbers": (header_with(lambda h: h.update(__metadata__={"a": 1})), "to texts"),
    "metadata that is a list": (header_with(lambda h: h.update(__metadata__=["a"])), "to texts"),
    "a header that starts with a space": (header(b" {" + T + b"}"), "starts with '{'"),
    "half a surrogate pair": (header(b"{" + T.replace(b"t", b"\\ud800", 1) + b"}"), "Unicode"),
    "an infinite size": (header(b"{" + T.replace(b"[2,2]", b"[Infinity]") + b"}"), "Infinity"),
    "a header of 9 MB": (header(b"{" + b" " * 9 * 2**20 + T + b"}"), "at most 8388608 are read"),
    "10^8 numbers": (gguf_array(0, 10**8, bytes(10**8)), "at most 2097152 are read"),
    "3 million texts": (gguf_array(8, 3 * 10**6, bytes(24 * 10**6)), "at most 2097152 are read"),
    "arrays in arrays": (gguf_array(9, 2, struct.pack("<IQ", 9, 1) * 2), "unsupported type 9"),
    "a million tensors": (
        replaced("model.gguf", b"GGUF" + struct.pack("<IQQ", 3, 10**6, 0) + bytes(24 * 10**6)),
        "at most 65536 are read",
    ),
    "alignment 0": (aligned(0), "general.alignment is 0"),
    "an alignment of 2^31": (aligned(2**31), "general.alignment is 2147483648"),
    "an alignment of 48": (aligned(48), "not a power of two"),
    "chunks beyond the array": (described(chunks=[4294967328, 192]), "'chunks' are [4294967328"),
    "chunks of nothing": (described(chunks=[0, 32]), "'chunks' are [0, 32]"),
    "chunks of text": (described(chunks="all"), "'chunks' are 'all'"),
    "chunks without end": (described(chunks=[1, 1]), "'0.0' has 4096 bytes, expected 4"),
    "a compressor": (described(compressor={"id": "blosc"}), "'compressor' is {'id': 'blosc'}"),
    "filters": (described(filters=[{"id": "delta"}]), "'filters' is"),
    "the other order": (described(order="F"), "'order' is 'F'"),
    "zarr version 3": (described(zarr_format=3), "'zarr_format' is 3"),
    "objects": (described(dtype="|O"), "'|O' of shape"),
    "a forged vocabulary": (ours(forged_vocabulary), "embed.tokens"),
    "NaN": (stored(put_nan), f"{Q} holds non-finite values"),
    "a pipe for an array": (stored(pipe), "not a regular file"),
    "a pipe for a description": (
        ours(lambda folder: pipe(folder / "params" / Q / ".zarray")),
        "not a regular file",
    ),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("case", CASES)
def test_forged_weights_give_one_line_that_names_the_culprit(tmp_path, case):
    build, expected = CASES[case]
    source = build(tmp_path)
    if (source / "model.gguf").is_file():
        source = source / "model.gguf"
    with pytest.raises(ValueError) as caught:
        load_checkpoint(source, "float32")
    message = str(caught.value)
    assert expected in message and "\n" not in message, message


def test_an_array_of_several_chunks_is_read(tmp_path):
    folder = ours(lambda folder: None)(tmp_path)
    before = np.asarray(
        load_checkpoint(folder, "float32").params["layers"][0]["attn"]["q"]["weight"]
    )
    path = folder / "params" / Q
    padded = np.zeros((40, 32), np.float32)
    padded[:32] = before
    for row in range(2):
        for column in range(2):
            part = padded[row * 20 : row * 20 + 20, column * 16 : column * 16 + 16]
            np.ascontiguousarray(part).tofile(path / f"{row}.{column}")
    data = json.loads((path / ".zarray").read_text()) | {"chunks": [20, 16]}
    (path / ".zarray").write_text(json.dumps(data))
    after = load_checkpoint(folder, "float32").params["layers"][0]["attn"]["q"]["weight"]
    np.testing.assert_array_equal(before, after)


def test_parameters_beyond_the_memory_are_refused_before_they_are_read(tmp_path, monkeypatch):
    folder = ours(lambda folder: None)(tmp_path)
    monkeypatch.setattr("jaxinfer.io.weights.available_bytes", lambda: 1000)
    for source in (folder, tmp_path / "hf"):
        with pytest.raises(ValueError, match="the parameters take .* there are 1000"):
            load_checkpoint(source, "float32")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 20) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=4,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "U8", "BOOL", "F4", "X"]) | JSON,
        "shape": st.lists(st.integers(0, 4), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(0, 24), min_size=2, max_size=2).map(sorted) | JSON,
    }
)
SOUND = st.lists(st.integers(0, 3), max_size=3).map(
    lambda sizes: {
        f"t{i}": {
            "dtype": "F32",
            "shape": [size],
            "data_offsets": [4 * sum(sizes[:i]), 4 * sum(sizes[: i + 1])],
        }
        for i, size in enumerate(sizes)
    }
)
TABLE = SOUND | st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), ENTRY | JSON)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(table=TABLE, extra=st.integers(-1, 1))
def test_what_is_accepted_the_official_reader_accepts_too(table, extra):
    ends = [v.get("data_offsets") for v in table.values() if isinstance(v, dict)]
    ends = [e[1] for e in ends if isinstance(e, list) and len(e) == 2 and type(e[1]) is int]
    with tempfile.TemporaryDirectory() as folder:
        size = max(0, max(ends, default=0) + extra)
        path = raw_safetensors(Path(folder) / "m.safetensors", table, bytes(min(size, 100)))
        try:
            ours = set(safetensors_header.read_header(path))
        except ValueError:
            ours = None
        try:
            with safe_open(path, "numpy") as file:
                theirs = set(file.keys())
        except (SafetensorError, OSError):
            theirs = None
    assert ours is None or ours == theirs
    if table.keys() <= {"t0", "t1", "t2"} and extra == 0:
        assert ours == theirs == set(table)


def hostile_tensor(folder: Path) -> Path:
    weights = tensors() | {HOSTILE: np.ones((2, 2), np.float32)}
    return hf_folder(folder / "m", weights=weights)


def hostile_gguf(folder: Path) -> Path:
    writer = gguf_writer(folder / "m.gguf")
    writer.add_tensor(HOSTILE[:60], np.ones((2, 2), np.float32))
    finish(writer)
    return folder / "m.gguf"


def hostile_architecture(folder: Path) -> Path:
    writer = gguf.GGUFWriter(folder / "m.gguf", HOSTILE)
    writer.add_tensor("token_embd.weight", np.ones((2, 2), np.float32))
    finish(writer)
    return folder / "m.gguf"


def hostile_key(folder: Path) -> Path:
    key = HOSTILE.encode()
    content = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key
    (folder / "m.gguf").write_bytes(content + struct.pack("<I", 77) + bytes(16))
    return folder / "m.gguf"


HOSTILES = {
    "a tensor without a place": hostile_tensor,
    "a tensor of a GGUF file": hostile_gguf,
    "an architecture": hostile_architecture,
    "a metadata key": hostile_key,
    "a tensor with a wrong entry": header_with(lambda h: h.update({HOSTILE: 3})),
    "a dtype": header_with(lambda h: h["t"].update(dtype=HOSTILE)),
    "a model type": lambda folder: hf_folder(
        folder / "m", CONFIG | {"model_type": HOSTILE}, tensors()
    ),
    "an activation": lambda folder: hf_folder(
        folder / "m", CONFIG | {"hidden_act": HOSTILE}, tensors()
    ),
    "a field of our config": ours(edited(lambda d: d["model"].update({HOSTILE: 1}))),
    "a value of our config": ours(edited(lambda d: d["model"].update(norm=HOSTILE))),
    "a version of our config": ours(edited(lambda d: d.update(format_version=HOSTILE))),
    "a family of our config": ours(edited(lambda d: d["model"].update(family=HOSTILE))),
    "a dtype of our config": ours(edited(lambda d: d.update(dtype=HOSTILE))),
    "an array's dtype": described(dtype=HOSTILE),
    "an array's order": described(order=HOSTILE),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("case", HOSTILES)
def test_names_from_files_reach_messages_escaped_and_short(tmp_path, case, recwarn):
    try:
        load_checkpoint(HOSTILES[case](tmp_path), "float32")
    except ValueError as error:
        messages = [str(error)]
    else:
        messages = [str(w.message) for w in recwarn if "were not read" in str(w.message)]
    assert messages
    for message in messages:
        assert message.isprintable() and len(message) < 1000, message


def test_the_limits_hold_published_models():
    assert safetensors_header.MAX_HEADER > 50_000 * 120
    assert gguf_header.MAX_ENTRIES > 777_050  # Gemma 3's tokens and merges
