"""The arrays of an artefact: a small safetensors file whose content is known before it is read.

A draft, feature maps or a session say which arrays of which shape and type they have. Each is held
against the file's header, and its bytes are read after that, so that no number in a forged file
allocates anything. The safetensors library checks the header itself.
"""

import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxinfer.files import one_line, quoted

_NAMES = {
    np.dtype(kind): name
    for name, kind in {
        "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16,
        "U32": np.uint32, "I32": np.int32, "F16": np.float16, "F32": np.float32,
    }.items()
}  # fmt: skip


class ArrayFile:
    """An open safetensors file; `opened` makes it."""

    def __init__(self, path: Path, file: safe_open):
        self.path, self._file = path, file
        self.metadata: dict[str, str] = file.metadata() or {}
        self.names = frozenset(file.keys())

    def size(self, name: str) -> int:
        """The length of an array of one axis; ValueError if there is no such array."""
        found = self._shape(name)
        if len(found) != 1:
            raise ValueError(f"{self.path}: array {quoted(name)} has shape {found}, expected [n]")
        return found[0]

    def check(self, name: str, shape: tuple[int, ...], dtype: type | np.dtype) -> None:
        """ValueError unless there is such an array, of this shape and type."""
        wanted = _NAMES[np.dtype(dtype)]
        found = self._shape(name)
        kind = self._file.get_slice(name).get_dtype()
        if tuple(found) != shape or kind != wanted:
            raise ValueError(
                f"{self.path}: array {quoted(name)} is {kind}{found}, expected "
                f"{wanted}{list(shape)}"
            )

    def read(self, name: str, shape: tuple[int, ...], dtype: type | np.dtype) -> np.ndarray:
        """An array that has to be of this shape and type; ValueError if it is not."""
        self.check(name, shape, dtype)
        return self._file.get_tensor(name)

    def check_names(self, names: Collection[str]) -> None:
        """Refuses arrays that are not among `names`."""
        unknown = sorted(self.names - set(names))
        if unknown:
            raise ValueError(f"{self.path}: array {quoted(unknown[0])} is not known")

    def _shape(self, name: str) -> list[int]:
        if name not in self.names:
            raise ValueError(f"{self.path}: array {quoted(name)} is missing")
        return self._file.get_slice(name).get_shape()


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[ArrayFile]:
    """The file at `path`; ValueError, also for what goes wrong while it is open, naming it."""
    path = Path(path)
    try:
        with safe_open(str(path), framework="numpy") as file:
            yield ArrayFile(path, file)
    except SafetensorError as error:
        reason = one_line(error, 160)
        raise ValueError(f"{path} is not a sound safetensors file: {reason}") from error
    except OSError as error:
        reason = one_line(error.strerror or error, 160)
        raise ValueError(f"cannot read {path}: {reason}") from error


def check_finite(array: np.ndarray, what: str) -> None:
    """Refuses numbers that are not finite."""
    if not np.isfinite(array).all():
        raise ValueError(f"{what} holds numbers that are not finite")
