"""`Checkpoint` and the project's own folder format.

    config.json       format name and version, dtype, ModelConfig.to_dict
    params/           the parameter tree, written by Orbax
    tokenizer.json, tokenizer_config.json, chat_template.jinja
    provenance.json   source, its SHA-256, versions, date, command

A folder appears whole or not at all (`jaxinfer.files`).
"""

import datetime
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from jaxinfer.config import ModelConfig
from jaxinfer.environment import package_version
from jaxinfer.files import (
    check_destination,
    one_line,
    quoted,
    read_json,
    replacing_folder,
    write_json,
)
from jaxinfer.io import orbax
from jaxinfer.io.dtypes import DType, resolve_dtype
from jaxinfer.io.tokenizer import Tokenizer, has_tokenizer
from jaxinfer.models.registry import family_for
from jaxinfer.typing import Json, Params

FORMAT = "jaxinfer"
WHAT = "a jaxinfer checkpoint"
MAX_CONFIG = 4 * 2**20
"""Bytes of a config.json; real ones have some thousand."""

VERSION = 2  # 2: weights [outputs, inputs]
PACKAGES = ("jaxinfer", "jax", "numpy", "orbax-checkpoint", "tokenizers", "gguf")


@dataclass(frozen=True)
class Checkpoint:
    """A model on its way in or out. `provenance` says where it came from (JSON-ready)."""

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer | None = None
    provenance: Json = field(default_factory=dict)


def is_checkpoint(folder: Path, *, current: bool = False) -> bool:
    """Whether `folder` holds our format, with `current` in the version that this release reads."""
    path = folder / "config.json"
    if not path.is_file():
        return False
    try:
        data = read_json(path, MAX_CONFIG)
    except ValueError:
        return False
    versions = (VERSION,) if current else (data.get("format_version"),)
    return data.get("format") == FORMAT and data.get("format_version") in versions


def save_checkpoint(folder: str | Path, checkpoint: Checkpoint, *, overwrite: bool = False) -> None:
    """Write `checkpoint` to `folder`, which appears whole or not at all.

    Args:
      folder: absent or empty; with `overwrite` also one that holds an older checkpoint.
      checkpoint: what is written.
      overwrite: replace a checkpoint that is there, but never any other folder.
    """
    folder = Path(folder)
    check_destination(folder, is_checkpoint, WHAT, overwrite=overwrite)
    with replacing_folder(folder) as temporary:
        config = {
            "format": FORMAT,
            "format_version": VERSION,
            "dtype": orbax.tree_dtype(checkpoint.params),
            "model": checkpoint.config.to_dict(),
        }
        orbax.save_params(temporary / "params", checkpoint.params)
        if checkpoint.tokenizer is not None:
            checkpoint.tokenizer.save(temporary)
        write_json(temporary / "provenance.json", _with_record(checkpoint.provenance))
        write_json(temporary / "config.json", config)


def load_checkpoint_folder(folder: str | Path, dtype: DType = None) -> Checkpoint:
    """The checkpoint in a folder of our format, cast to `dtype` (None: the backend's default)."""
    folder = Path(folder)
    data = read_json(folder / "config.json", MAX_CONFIG)
    if data.get("format") != FORMAT:
        raise ValueError(f"{folder} is not a {FORMAT} checkpoint; its config.json lacks the format")
    if data.get("format_version") != VERSION:
        raise ValueError(
            f"{folder} has format version {quoted(data.get('format_version'))}; this release reads "
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


def _config(data: object, folder: Path) -> ModelConfig:
    if not isinstance(data, dict):
        raise ValueError(f"{folder}: config.json lacks the object 'model'; it is damaged")
    try:
        config = ModelConfig.from_dict(data)
        family_for(config.family)
    except ValueError as error:
        raise ValueError(f"{folder}: config.json is wrong: {one_line(error)}") from error
    return config


def _with_record(provenance: Json) -> Json:
    record = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        # names only: a checkpoint that is passed on should not tell where its maker keeps files
        "command": [Path(word).name if os.path.isabs(word) else word for word in sys.argv],
        "versions": {name: package_version(name) for name in PACKAGES},
    }
    return record | provenance
