"""`Safetensors`: the tensors of a Hugging Face folder, one model.safetensors or an index's shards.

Tensors are views of the mapped files, and `release` gives their pages back.
"""

import mmap
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NoReturn

import numpy as np

from jaxinfer.files import one_line, quoted, read_json
from jaxinfer.io.safetensors_header import (
    FLOATS,
    MAX_HEADER,
    MAX_HEADERS,
    Entry,
    header_bytes,
    read_header,
)
from jaxinfer.io.weights import close_quietly, drop_pages

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Safetensors:
    """The tensors of a Hugging Face folder, by name, from one file or from the index's shards."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.where = str(self.folder)
        self._entries: dict[str, tuple[Path, Entry]] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        weight_map = _weight_map(self.folder)
        paths = list(dict.fromkeys(weight_map.values())) if weight_map else [self.folder / SINGLE]
        _check_headers(self.folder, paths)
        for path in paths:
            for name, entry in read_header(path).items():
                if weight_map is None or weight_map.get(name) == path:
                    self._entries[name] = (path, entry)
        for name, path in (weight_map or {}).items():
            if name not in self._entries:
                raise ValueError(f"{path} lacks tensor {quoted(name)}, which {INDEX} places there")

    def close(self) -> None:
        for mapping in self._maps.values():
            close_quietly(mapping)
        self._maps.clear()

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def unused(self, used: Collection[str]) -> Iterable[str]:
        return [name for name in self._entries if name not in used]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name][1].shape

    def read(self, name: str) -> np.ndarray:
        """A read-only view of the tensor in the mapped file."""
        path, entry = self._entries[name]
        if entry.dtype not in FLOATS:
            raise ValueError(
                f"{path}: tensor {quoted(name)} has dtype {entry.dtype}; weights must be "
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


def _check_headers(folder: Path, paths: list[Path]) -> None:
    total = sum(min(header_bytes(path), MAX_HEADER) for path in paths)
    if total > MAX_HEADERS:
        raise ValueError(
            f"{folder}: the headers of its {len(paths)} safetensors files have {total} bytes; at "
            f"most {MAX_HEADERS} are read"
        )


def _weight_map(folder: Path) -> dict[str, Path] | None:
    """Tensor name -> shard, or None for a folder with a single file."""
    if (folder / SINGLE).is_file():
        return None
    path = folder / INDEX
    if not path.is_file():
        _refuse_folder(folder)
    names = read_json(path, MAX_HEADER).get("weight_map")
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
                f"{path}: tensor {quoted(name)} is placed in "
                f"{quoted(shard)}, expected the name of a .safetensors file beside it"
            )
        if not os.path.isfile(folder / shard):  # a name too long is no error to os.path
            raise ValueError(
                f"{path} names the file {quoted(shard)}, which is missing; download it"
            )
        result[name] = folder / shard
    return result


def _refuse_folder(folder: Path) -> NoReturn:
    pickles = sorted(
        path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt")
    )
    if pickles:
        raise ValueError(
            f"{folder} holds PyTorch pickles ({one_line(pickles[0], 80)}), which can run code when "
            "opened; save the model again with save_pretrained(safe_serialization=True)"
        )
    raise ValueError(f"{folder} has no weights; expected {SINGLE} or {INDEX}")
