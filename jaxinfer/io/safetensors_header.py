"""The header of a safetensors file, checked before a byte of data is believed.

A file is an 8-byte header length, a JSON header {name: {dtype, shape, data_offsets}}, and the data.
Everything in the header may be forged, so the format's rules are held to the letter: no key occurs
twice, the ranges fill the data without a hole, and each is dtype times shape long. The official
reader's Python interface passes over repeated keys and gives no offsets, so its rules are here,
and a test compares the two. Nothing is allocated from an unchecked number.
"""

import json
import math
import os
import reprlib
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

import ml_dtypes
import numpy as np

from jaxinfer.files import one_line, quoted

MAX_HEADER = 8 * 2**20
"""Bytes. The format allows 100 MB, whose JSON is 2.5 GB in Python; here is room for
75,000 tensors, and published files have a few thousand."""

MAX_HEADERS = 2 * MAX_HEADER
"""Of all shards together: reading them must not take minutes."""

MAX_RANK = 8
FLOATS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_OTHER_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32}
_OTHER_BITS |= {"I64": 64, "U64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
_OTHER_BITS |= {"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}
BITS = {name: dtype.itemsize * 8 for name, dtype in FLOATS.items()} | _OTHER_BITS


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: dtype name, shape, absolute byte range."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: str | os.PathLike) -> dict[str, Entry]:
    """The checked table of tensors of a file; a one-line ValueError if it is not sound."""
    path = Path(path)
    text, size = _header_text(path)
    header = _parsed(path, text)
    _check_metadata(path, header.pop("__metadata__", None))
    base = 8 + len(text)
    entries = {name: _entry(path, name, value, base, size) for name, value in header.items()}
    _check_filled(path, entries, base, size)
    return entries


def header_bytes(path: Path) -> int:
    """The length that a file gives its header, unchecked; 0 for a file too short to say."""
    try:
        with path.open("rb") as file:
            return int.from_bytes(file.read(8), "little")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or one_line(error)}") from error


def _header_text(path: Path) -> tuple[bytes, int]:
    """The JSON of the header, and the bytes of the whole file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else 0
            if not 2 <= length <= size - 8:
                _refuse(path, f"its header length is {length}, the file has {size} bytes")
            if length > MAX_HEADER:
                _refuse(path, f"its header has {length} bytes; at most {MAX_HEADER} are read")
            text = file.read(length)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or one_line(error)}") from error
    if not text.startswith(b"{"):
        _refuse(path, "its header is not a JSON object that starts with '{'")
    return text, size


def _parsed(path: Path, text: bytes) -> dict[str, Any]:
    """The header as a dictionary; unlike `json.loads` alone, without a key that occurs twice."""
    try:
        return json.loads(
            text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_number
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the header of {path} is not valid JSON: {one_line(error)}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"{quoted(twice)} occurs twice")
    return result


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number of JSON")


def _check_metadata(path: Path, metadata: Any) -> None:
    if metadata is None:
        return
    words = [*metadata, *metadata.values()] if isinstance(metadata, dict) else [None]
    if not all(_is_text(word) for word in words):
        _refuse(path, "'__metadata__' does not map names to texts")


def _is_text(value: Any) -> bool:
    """Whether `value` is a string of Unicode characters: JSON can escape half a surrogate pair."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _refuse(path: Path, message: str) -> NoReturn:
    raise ValueError(f"{path} is not a sound safetensors file: {message}")


def _entry(path: Path, name: str, value: Any, base: int, size: int) -> Entry:
    def refuse(message: str) -> NoReturn:
        _refuse(path, f"tensor {quoted(name)} {message}")

    if not _is_text(name):
        refuse("has a name that is not Unicode text")
    if not isinstance(value, dict):
        refuse("has no description")
    dtype, shape, offsets = (value.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in BITS:
        refuse(f"has unknown dtype {quoted(dtype, 40)}")
    if not _are_sizes(shape, MAX_RANK):
        refuse(f"has shape {reprlib.repr(shape)}, expected a list of sizes")
    if not _are_sizes(offsets, 2) or len(offsets) != 2 or offsets[0] > offsets[1]:
        refuse(f"has offsets {reprlib.repr(offsets)}, expected [start, stop]")
    start, stop = base + offsets[0], base + offsets[1]
    if stop > size:
        refuse(f"ends at byte {stop}, the file has {size}; is the download complete?")
    bits = math.prod(shape) * BITS[dtype]
    if bits != (stop - start) * 8:
        refuse(f"is {dtype}{shape}, {one_line(bits // 8, 30)} bytes, but has {stop - start}")
    return Entry(dtype, tuple(shape), start, stop)


def _are_sizes(value: Any, most: int) -> TypeGuard[list[int]]:
    if not isinstance(value, list) or len(value) > most:
        return False
    return all(type(size) is int and 0 <= size < 2**62 for size in value)


def _check_filled(path: Path, entries: dict[str, Entry], base: int, size: int) -> None:
    """The ranges, in their order in the file, follow each other from the header to the end."""
    end, previous = base, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start < end:
            _refuse(path, f"tensors {quoted(previous)} and {quoted(name)} overlap")
        if entry.start > end:
            _refuse(path, f"{entry.start - end} bytes before tensor {quoted(name)} are no tensor")
        end, previous = entry.stop, name
    if end != size:
        _refuse(path, f"{size - end} bytes after the last tensor are no tensor")
