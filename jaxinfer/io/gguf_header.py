"""The header of a GGUF file, every length in it checked against the file before it is believed.

GGUF (versions 2 and 3, little endian): magic, version, tensor count, metadata count, metadata
(key, type, value), tensor infos (name, dimensions, type, offset), padding, data. Counts and lengths
are 64-bit numbers from the file; a forged one must neither allocate memory nor loop, so each is
held against the bytes that remain, and all together against limits some times above what published
models have: an array entry of one byte is 8 bytes or more in Python. Dimensions are returned in
NumPy order (slowest first).
"""

import functools
import math
import mmap
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from jaxinfer.files import one_line, quoted

MAGIC = b"GGUF"
MAX_NAME = 65_535
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 2**20
MAX_FIELDS = 2**16
MAX_TENSORS = 2**16
MAX_HEADER = 64 * 2**20
"""Bytes; Gemma 3's 262,144 tokens with their merges take 15 MB."""

MAX_ENTRIES = 2**21
"""Of all arrays of text together, and of all arrays of numbers; Gemma 3 has 777,050 texts."""

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_SMALLEST_FIELD = 8 + 4 + 1
_SMALLEST_TENSOR = 8 + 4 + 4 + 8


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `shape` in NumPy order, its file, absolute `offset`, size in bytes."""

    path: Path
    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class GGUFHeader:
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_header(path: str | os.PathLike) -> GGUFHeader:
    """Metadata and tensor table of a GGUF file; a one-line ValueError if it is not sound."""
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if size < 24 or file.read(4) != MAGIC:
                raise ValueError(f"{path} is not a GGUF file (it does not start with 'GGUF')")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Cursor(data, size, path).header()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or one_line(error)}") from error


class _Cursor:
    """A position in the mapped file and the checks that move it."""

    def __init__(self, data: mmap.mmap, size: int, path: Path):
        self.data, self.size, self.path, self.at = data, size, path, 4
        self.end = min(size, MAX_HEADER)
        self.texts = self.numbers = 0

    def header(self) -> GGUFHeader:
        version = self.number("I")
        if version not in (2, 3):
            self.refuse(f"its version is {version}; versions 2 and 3 (little endian) are read")
        num_tensors, num_fields = self.number("Q"), self.number("Q")
        self.check_count("metadata", num_fields, _SMALLEST_FIELD, MAX_FIELDS)
        self.check_count("tensor", num_tensors, _SMALLEST_TENSOR, MAX_TENSORS)
        metadata: dict[str, Any] = {}
        for _ in range(num_fields):
            key = self.string("a metadata key", MAX_NAME)
            if key in metadata:
                self.refuse(f"metadata key {quoted(key)} occurs twice")
            metadata[key] = self.value(self.number("I"), key)
        tensors = [self.tensor() for _ in range(num_tensors)]
        return GGUFHeader(metadata, self.placed(tensors, metadata))

    def refuse(self, message: str) -> NoReturn:
        raise ValueError(f"{self.path} is not a sound GGUF file: {message}")

    def take(self, count: int, what: str) -> int:
        """Advance by `count` bytes and return where they start."""
        if count > self.size - self.at:
            self.refuse(f"{what} needs {count} bytes at offset {self.at}, the file has {self.size}")
        if count > self.end - self.at:
            self.refuse(f"its header has more than {MAX_HEADER} bytes, at {what}")
        start, self.at = self.at, self.at + count
        return start

    def number(self, form: str) -> Any:
        start = self.take(struct.calcsize("<" + form), "a number")
        if form == "?":
            return self.data[start] != 0
        return struct.unpack_from("<" + form, self.data, start)[0]

    def check_count(self, what: str, count: int, smallest: int, most: int) -> None:
        if count * smallest > self.size - self.at:
            self.refuse(
                f"it announces {count} {what} entries, more than {self.size} bytes can hold"
            )
        if count > most:
            self.refuse(f"it announces {count} {what} entries; at most {most} are read")

    def string(self, what: str, limit: int | None = None) -> str:
        length = self.number("Q")
        if limit is not None and length > limit:
            self.refuse(f"{what} of {length} bytes; at most {limit} are allowed")
        start = self.take(length, what)
        try:
            return self.data[start : self.at].decode("utf-8")
        except UnicodeDecodeError:
            self.refuse(f"{what} at offset {start} is not UTF-8")

    def value(self, kind: int, key: str) -> Any:
        what = f"metadata {quoted(key)}"
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string(what)
        if kind != _ARRAY:
            self.refuse(f"{what} has unknown type {kind}")
        item, count = self.number("I"), self.number("Q")
        if item == _STRING:
            self.check_count(f"{what} text", count, 8, MAX_ENTRIES - self.texts)
            self.texts += count
            return [self.string(what) for _ in range(count)]
        if item not in _SCALARS:
            self.refuse(f"{what} is an array of unsupported type {item}")
        form = _SCALARS[item]
        width = struct.calcsize("<" + form)
        self.check_count(f"{what} number", count, width, MAX_ENTRIES - self.numbers)
        self.numbers += count
        return list(
            struct.unpack_from(f"<{count}{form}", self.data, self.take(count * width, what))
        )

    def tensor(self) -> TensorInfo:
        name = self.string("a tensor name", MAX_NAME)
        rank = self.number("I")
        if not 1 <= rank <= MAX_DIMENSIONS:
            self.refuse(
                f"tensor {quoted(name)} has {rank} dimensions, expected 1 to {MAX_DIMENSIONS}"
            )
        shape = tuple(self.number("Q") for _ in range(rank))[::-1]
        type_id, offset = self.number("I"), self.number("Q")
        num_bytes = self.num_bytes(name, shape, type_id)
        return TensorInfo(self.path, name, shape, type_id, offset, num_bytes)

    def num_bytes(self, name: str, shape: tuple[int, ...], type_id: int) -> int:
        if type_id not in _blocks():
            self.refuse(f"tensor {quoted(name)} has unknown type {type_id}")
        block, block_bytes = _blocks()[type_id]
        elements = math.prod(shape)
        if elements == 0:
            self.refuse(f"tensor {quoted(name)} is empty (shape {list(shape)})")
        if shape[-1] % block:
            self.refuse(
                f"tensor {quoted(name)}: rows of {shape[-1]} are not whole blocks of {block}"
            )
        return elements // block * block_bytes

    def placed(
        self, tensors: Sequence[TensorInfo], metadata: dict[str, Any]
    ) -> dict[str, TensorInfo]:
        """The tensors by name with absolute offsets, inside the file and apart from each other."""
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT:
            self.refuse(f"general.alignment is {quoted(alignment)}, expected a power of two")
        if alignment & (alignment - 1):
            self.refuse(f"general.alignment {alignment} is not a power of two")
        base = -(-self.at // alignment) * alignment
        result: dict[str, TensorInfo] = {}
        end, previous = base, ""
        for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
            start = base + tensor.offset
            if tensor.name in result:
                self.refuse(f"tensor {quoted(tensor.name)} occurs twice")
            if tensor.offset % alignment:
                self.refuse(f"tensor {quoted(tensor.name)} starts at {tensor.offset}, not aligned")
            if start + tensor.num_bytes > self.size:
                self.refuse(
                    f"tensor {quoted(tensor.name)} ends at byte {start + tensor.num_bytes}, "
                    f"the file has {self.size}; is the download complete?"
                )
            if start < end:
                self.refuse(f"tensors {quoted(previous)} and {quoted(tensor.name)} overlap")
            end, previous = start + tensor.num_bytes, tensor.name
            result[tensor.name] = replace(tensor, offset=start)
        return result


@functools.cache
def _blocks() -> dict[int, tuple[int, int]]:
    """Weights and bytes of a block, by the number of a tensor type."""
    from gguf.constants import GGML_QUANT_SIZES

    return {kind.value: size for kind, size in GGML_QUANT_SIZES.items()}
