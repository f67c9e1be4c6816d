"""The folder of a run that may be killed at any moment: its options, arrays and logs."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxinfer.files import read_json, replacing, write_json


def check_options(run: Path, options: Mapping[str, object]) -> None:
    """Records a run's options; refuses to go on with other ones."""
    path = run / "options.json"
    if path.is_file():
        found = read_json(path)
        changed = [name for name in options if found.get(name) != options[name]]
        if changed:
            raise ValueError(
                f"{run} was started with other {', '.join(changed)}; use a new --run-dir"
            )
    write_json(path, options)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz file by name."""
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Puts arrays into an npz file, in one step."""
    with replacing(path) as temporary:
        np.savez(temporary, allow_pickle=False, **arrays)


def append_line(path: Path, record: Mapping[str, object]) -> None:
    """Adds a JSON line to a log."""
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")
