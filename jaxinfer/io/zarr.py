"""The arrays of our folders: Zarr version 2 as Orbax writes it, uncompressed, in C order.

An array is a folder of a `.zarray` file, its description, and a file of raw numbers for each chunk:
one chunk, or one a device where the parameters were spread over several. Descriptions are
untrusted: every number in one is held against what the caller expects and against the sizes of the
files before anything is mapped or allocated. Orbax's own engine, TensorStore, allocates what a
forged chunk size asks for and ends the process. Links are followed, pipes and devices are refused.
"""

import itertools
import math
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from jaxinfer.files import one_line, quoted, read_json

MAX_DESCRIPTION = 2**16
MAX_CHUNKS = 4096
PLAIN = {
    "zarr_format": 2,
    "order": "C",
    "dimension_separator": ".",
    "compressor": None,
    "filters": None,
}
DTYPES = {
    "float32": "<f4", "float16": "<f2", "bfloat16": "bfloat16", "int8": "|i1", "bool": "|b1"
}  # fmt: skip


@dataclass(frozen=True)
class ZarrArray:
    """An array whose description and files were found sound."""

    folder: Path
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype

    def parts(self) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
        """Each chunk as a view of its mapped file, and its place in the array."""
        for corner in self._corners():
            place = tuple(
                slice(start, min(start + chunk, size))
                for start, chunk, size in zip(corner, self.chunks, self.shape, strict=True)
            )
            file = np.memmap(self._file(corner), self.dtype, "r", shape=self.chunks)
            inside = tuple(slice(0, part.stop - part.start) for part in place)
            part = np.asarray(file)[inside]
            # a byte that is neither 0 nor 1 is no bool
            yield place, part.view(np.uint8) != 0 if self.dtype == np.bool_ else part

    def check_files(self) -> None:
        """Refuses a chunk that is missing, of another size, or no regular file."""
        expected = math.prod(self.chunks) * self.dtype.itemsize
        for corner in self._corners():
            path = self._file(corner)
            try:
                found = os.stat(path)
            except OSError as error:
                _refuse(self.folder, f"its file {path.name!r}: {error.strerror}")
            if not stat.S_ISREG(found.st_mode):
                _refuse(self.folder, f"its file {path.name!r} is not a regular file")
            if found.st_size != expected:
                _refuse(
                    self.folder,
                    f"its file {path.name!r} has {found.st_size} bytes, expected {expected}",
                )

    def _corners(self) -> Iterator[tuple[int, ...]]:
        steps = zip(self.shape, self.chunks, strict=True)
        return itertools.product(*(range(0, size, chunk) for size, chunk in steps))

    def _file(self, corner: tuple[int, ...]) -> Path:
        numbers = (start // chunk for start, chunk in zip(corner, self.chunks, strict=True))
        return self.folder / ".".join(map(str, numbers))


def open_array(folder: Path, shape: tuple[int, ...], dtype: np.dtype) -> ZarrArray:
    """The array in `folder`, which must have this shape and dtype.

    Raises:
      ValueError: what is wrong with the folder, in one line.
    """
    try:
        data = read_json(folder / ".zarray", MAX_DESCRIPTION)
    except ValueError as error:
        _refuse(folder, one_line(error, 200))
    for key, value in PLAIN.items():
        if data.get(key) != value:
            _refuse(folder, f"its {key!r} is {quoted(data.get(key))}, expected {value!r}")
    found = data.get("shape")
    if found != list(shape) or data.get("dtype") != DTYPES[dtype.name]:
        raise ValueError(
            f"{folder.parent}: {folder.name} is {quoted(data.get('dtype'), 20)} of shape "
            f"{quoted(found)}, config.json says {dtype.name}{list(shape)}; the checkpoint is "
            "damaged, convert the model again"
        )
    chunks = data.get("chunks")
    if (
        not isinstance(chunks, list)
        or len(chunks) != len(shape)
        or not all(type(c) is int and 0 < c <= s for c, s in zip(chunks, shape, strict=True))
    ):
        _refuse(folder, f"its 'chunks' are {quoted(chunks)} for the shape {list(shape)}")
    if math.prod(-(-s // c) for s, c in zip(shape, chunks, strict=True)) > MAX_CHUNKS:
        _refuse(folder, f"its 'chunks' {chunks} are more than {MAX_CHUNKS} files")
    array = ZarrArray(folder, shape, tuple(chunks), dtype)
    array.check_files()
    return array


def _refuse(folder: Path, message: str) -> NoReturn:
    raise ValueError(
        f"{folder.parent}: cannot read {folder.name} ({message}); the checkpoint is damaged, "
        "convert the model again"
    )
