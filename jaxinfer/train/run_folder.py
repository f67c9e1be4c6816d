"""The folder of a run that may be killed at any moment: its options, arrays and logs."""

import contextlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from jaxinfer.files import one_line, read_json, replacing, write_json


def check_options(run: Path, options: Mapping[str, object]) -> None:
    """Records a run's options; refuses to go on with other ones."""
    path = run / "options.json"
    if path.is_file():
        try:
            found = read_json(path)
        except ValueError as error:
            raise ValueError(
                f"{one_line(error)}; it should hold the options that this run was started with: "
                "remove it if they are the present ones, or use a new --run-dir"
            ) from error
        changed = [name for name in options if found.get(name) != options[name]]
        if changed:
            raise ValueError(
                f"{run} was started with other {', '.join(changed)}; use a new --run-dir"
            )
        return
    write_json(path, options)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz file by name."""
    with _sound(path), np.load(path) as file:
        return {name: file[name] for name in file.files}


def read_array(path: Path, mmap_mode: Literal["r"] | None = None) -> np.ndarray:
    """The array of an npy file."""
    with _sound(path):
        return np.load(path, mmap_mode=mmap_mode)


@contextlib.contextmanager
def _sound(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is damaged ({one_line(error, 100)}); remove it, and the run makes it again"
        ) from error


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Puts arrays into an npz file, in one step."""
    with replacing(path) as temporary:
        np.savez(temporary, allow_pickle=False, **arrays)


def append_line(path: Path, record: Mapping[str, object]) -> None:
    """Adds a JSON line to a log."""
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")
