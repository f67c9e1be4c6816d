"""Safetensors files, their headers checked by us before a byte of data is believed.

A file is an 8-byte header length, a JSON header {name: {dtype, shape, data_offsets}}, and the data.
Everything in the header may be forged, so lengths are held against the file, ranges against each
other and dtype times shape against the range; nothing is allocated from an unchecked number.
`Safetensors` is the `TensorStore` of a folder: one model.safetensors, or the shards of its index.
Tensors are views of the mapped file, and `release` gives their pages back.
"""

import math
import mmap
import os
import struct
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

import ml_dtypes
import numpy as np

from jaxinfer.files import one_line, parse_json, read_json
from jaxinfer.io.weights import close_quietly, drop_pages

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER = 100 * 2**20
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
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else 0
            limit = min(MAX_HEADER, size - 8)
            if not 2 <= length <= limit:
                _refuse(path, f"its header length is {length}, the file has {size} bytes")
            text = file.read(length)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or one_line(error)}") from error
    header = parse_json(text, f"the header of {path}")
    if not isinstance(header, dict):
        _refuse(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    base = 8 + length
    entries = {name: _entry(path, name, value, base, size) for name, value in header.items()}
    _check_apart(path, entries)
    return entries


def _refuse(path: Path, message: str) -> NoReturn:
    raise ValueError(f"{path} is not a sound safetensors file: {message}")


def _entry(path: Path, name: str, value: Any, base: int, size: int) -> Entry:
    what = f"tensor {one_line(repr(name), 80)}"
    if not isinstance(value, dict):
        _refuse(path, f"{what} has no description")
    dtype, shape, offsets = (value.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in BITS:
        _refuse(path, f"{what} has unknown dtype {one_line(repr(dtype), 40)}")
    if not _are_sizes(shape) or len(shape) > MAX_RANK:
        _refuse(path, f"{what} has shape {one_line(repr(shape), 60)}, expected a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _refuse(path, f"{what} has offsets {one_line(repr(offsets), 60)}, expected [start, stop]")
    start, stop = base + offsets[0], base + offsets[1]
    if stop > size:
        _refuse(
            path,
            f"{what} ends at byte {one_line(stop, 30)}, the file has {size}; "
            "is the download complete?",
        )
    bits = math.prod(shape) * BITS[dtype]
    if bits != (stop - start) * 8:
        _refuse(
            path,
            f"{what} is {dtype}{shape}, {one_line(bits // 8, 30)} bytes, but has {stop - start}",
        )
    return Entry(dtype, tuple(shape), start, stop)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**62 for v in value)


def _check_apart(path: Path, entries: dict[str, Entry]) -> None:
    end, previous = 0, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start < end:
            _refuse(path, f"tensors {previous!r} and {name!r} overlap")
        end, previous = entry.stop, name


class Safetensors:
    """The tensors of a Hugging Face folder, by name, from one file or from the index's shards."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.where = str(self.folder)
        self._entries: dict[str, tuple[Path, Entry]] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        weight_map = _weight_map(self.folder)
        for path in dict.fromkeys(weight_map.values()) if weight_map else [self.folder / SINGLE]:
            for name, entry in read_header(path).items():
                if weight_map is None or weight_map.get(name) == path:
                    self._entries[name] = (path, entry)
        for name, path in (weight_map or {}).items():
            if name not in self._entries:
                raise ValueError(f"{path} lacks tensor {name!r}, which {INDEX} places there")

    def close(self) -> None:
        for mapping in self._maps.values():
            close_quietly(mapping)
        self._maps.clear()

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def unused(self, used: Collection[str]) -> Iterable[str]:
        return [name for name in self._entries if name not in used]

    def read(self, name: str) -> np.ndarray:
        """A read-only view of the tensor in the mapped file."""
        path, entry = self._entries[name]
        if entry.dtype not in FLOATS:
            raise ValueError(
                f"{path}: tensor {name!r} has dtype {entry.dtype}; weights must be "
                f"{', '.join(FLOATS)}; give an unquantized checkpoint"
            )
        dtype = FLOATS[entry.dtype]
        count = (entry.stop - entry.start) // dtype.itemsize
        if count == 0:
            return np.empty(entry.shape, dtype)
        data = np.frombuffer(self._map(path), dtype, count, entry.start)
        return data.reshape(entry.shape)

    def release(self, name: str) -> None:
        path, entry = self._entries[name]
        if path in self._maps and entry.stop > entry.start:
            drop_pages(self._maps[path], entry.start, entry.stop - entry.start)

    def _map(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            with path.open("rb") as file:
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[path]


def _weight_map(folder: Path) -> dict[str, Path] | None:
    """Tensor name -> shard, or None for a folder with a single file."""
    if (folder / SINGLE).is_file():
        return None
    path = folder / INDEX
    if not path.is_file():
        _refuse_folder(folder)
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{path} lacks a 'weight_map' of tensor names to files")
    result = {}
    for name, shard in names.items():
        if (
            not isinstance(shard, str)
            or not shard.endswith(".safetensors")
            or shard != os.path.basename(shard)
            or "\\" in shard
            or "\0" in shard
        ):
            raise ValueError(
                f"{path}: tensor {one_line(repr(name), 80)} is placed in "
                f"{one_line(repr(shard), 80)}, expected the name of a .safetensors file beside it"
            )
        if not os.path.isfile(folder / shard):  # a name too long is no error to os.path
            raise ValueError(f"{path} names the file {shard!r}, which is missing; download it")
        result[name] = folder / shard
    return result


def _refuse_folder(folder: Path) -> NoReturn:
    pickles = sorted(
        path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt")
    )
    if pickles:
        raise ValueError(
            f"{folder} holds PyTorch pickles ({pickles[0]}), which can run code when opened; save "
            "the model again with save_pretrained(safe_serialization=True)"
        )
    raise ValueError(f"{folder} has no weights; expected {SINGLE} or {INDEX}")
