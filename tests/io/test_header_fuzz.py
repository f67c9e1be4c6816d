"""Random damage to small good files: both header parsers read them or refuse them, quickly."""

import struct
import tempfile
from pathlib import Path

import gguf
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tiny_checkpoints import finish

from jaxinfer.io import gguf_header, safetensors_reader


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
