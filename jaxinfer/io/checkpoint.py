"""`Checkpoint` and the project's own folder format.

    config.json       format name and version, dtype, ModelConfig.to_dict
    params/           the parameter tree, written by Orbax
    tokenizer.json, tokenizer_config.json, chat_template.jinja
    provenance.json   source, its SHA-256, versions, date, command

A folder appears whole or not at all: it is written next to its final place and renamed. Whatever a
killed process leaves behind is a hidden sibling that the next `save_checkpoint` removes
(`jaxinfer.io.partial`).
"""

import contextlib
import datetime
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from jaxinfer.config import ModelConfig
from jaxinfer.io import orbax
from jaxinfer.io.dtypes import resolve_dtype
from jaxinfer.io.jsonfile import one_line, read_json
from jaxinfer.io.partial import partial_folder
from jaxinfer.io.tokenizer import Tokenizer, has_tokenizer
from jaxinfer.models.registry import family_for
from jaxinfer.typing import Params

FORMAT = "jaxinfer"
VERSION = 2  # 2: weights [outputs, inputs]
PACKAGES = ("jaxinfer", "jax", "numpy", "orbax-checkpoint", "tokenizers", "gguf")


@dataclass(frozen=True)
class Checkpoint:
    """A model on its way in or out. `provenance` says where it came from (JSON-ready)."""

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer | None = None
    provenance: dict[str, Any] = field(default_factory=dict)


def is_checkpoint(folder: Path, *, current: bool = False) -> bool:
    """Whether `folder` holds our format, with `current` in the version that this release reads."""
    path = folder / "config.json"
    if not path.is_file():
        return False
    try:
        data = read_json(path)
    except ValueError:
        return False
    versions = (VERSION,) if current else (data.get("format_version"),)
    return data.get("format") == FORMAT and data.get("format_version") in versions


def save_checkpoint(folder: str | Path, checkpoint: Checkpoint) -> None:
    """Write `checkpoint` to `folder`, replacing a checkpoint there but never any other folder."""
    folder = Path(folder)
    check_destination(folder)
    with replacing(folder) as temporary:
        config = {
            "format": FORMAT,
            "format_version": VERSION,
            "dtype": orbax.tree_dtype(checkpoint.params),
            "model": checkpoint.config.to_dict(),
        }
        orbax.save_params(temporary / "params", checkpoint.params)
        if checkpoint.tokenizer is not None:
            checkpoint.tokenizer.save(temporary)
        _write_json(temporary / "provenance.json", _with_record(checkpoint.provenance))
        _write_json(temporary / "config.json", config)


def load_checkpoint_folder(folder: str | Path, dtype: Any = None) -> Checkpoint:
    """The checkpoint in a folder of our format, cast to `dtype` (None: the backend's default)."""
    folder = Path(folder)
    data = read_json(folder / "config.json")
    if data.get("format") != FORMAT:
        raise ValueError(f"{folder} is not a {FORMAT} checkpoint; its config.json lacks the format")
    if data.get("format_version") != VERSION:
        raise ValueError(
            f"{folder} has format version {data.get('format_version')!r}; this release reads "
            f"{VERSION}; convert the model again"
        )
    config = _config(data.get("model"), folder)
    stored = data.get("dtype")
    if not isinstance(stored, str):
        raise ValueError(f"{folder}: config.json lacks 'dtype'; it is damaged")
    params = orbax.load_params(
        folder / "params", config, resolve_dtype(stored), resolve_dtype(dtype)
    )
    tokenizer = Tokenizer.load(folder) if has_tokenizer(folder) else None
    path = folder / "provenance.json"
    return Checkpoint(config, params, tokenizer, read_json(path) if path.is_file() else {})


def _config(data: Any, folder: Path) -> ModelConfig:
    if not isinstance(data, dict):
        raise ValueError(f"{folder}: config.json lacks the object 'model'; it is damaged")
    try:
        config = ModelConfig.from_dict(data)
        family_for(config.family)
    except ValueError as error:
        raise ValueError(f"{folder}: config.json is wrong: {one_line(error)}") from error
    return config


def check_destination(folder: Path) -> None:
    """Raise unless `folder` is absent, empty or an older checkpoint of ours."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"{folder} exists and is not a folder; choose another destination")
    if folder.is_dir() and any(folder.iterdir()) and not is_checkpoint(folder):
        raise ValueError(
            f"{folder} exists and is not a {FORMAT} checkpoint; choose another destination"
        )
    missing = next((p for p in folder.absolute().parents if p.exists()), None)
    if missing is not None and not missing.is_dir():
        raise ValueError(f"{missing} is not a folder; choose another destination than {folder}")


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A temporary sibling that takes the place of `folder` when the block ends without an error.

    A reader sees the old folder, the new one, or for the moment between two renames none; never a
    half-written one.
    """
    folder = folder.absolute()
    with partial_folder(folder, "writing") as temporary:
        content = temporary / "new"
        content.mkdir()
        yield content
        _flush(content)
        if folder.exists():
            os.rename(folder, temporary / "old")
        os.rename(content, folder)


def publish(content: Path, folder: Path) -> None:
    """Move a finished folder to its place; where another process was first, its copy stays."""
    try:
        os.rename(content, folder)
    except OSError:
        if not folder.is_dir():
            raise


def _flush(folder: Path) -> None:
    """Reach the disk before the rename does, so that a power cut cannot leave empty files."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _with_record(provenance: dict[str, Any]) -> dict[str, Any]:
    record = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        # names only: a checkpoint that is passed on should not tell where its maker keeps files
        "command": [Path(word).name if os.path.isabs(word) else word for word in sys.argv],
        "versions": {name: _version(name) for name in PACKAGES},
    }
    return record | provenance


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
