"""`Checkpoint` and the project's own folder format.

    config.json       format name and version; ModelConfig.to_dict; the model's dtype, and which
                      arrays have another; whether matrices are int8 rows; sparse parts
    params/           the parameters, an array each, written by Orbax
    tokenizer.json, tokenizer_config.json, chat_template.jinja
    provenance.json   source, its SHA-256, versions, date, command

A folder appears whole or not at all (`jaxinfer.files`).
"""

import datetime
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

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
from jaxinfer.io.dtypes import BY_NAME, DType, resolve_dtype
from jaxinfer.io.int8 import encoded
from jaxinfer.io.leaves import StoredLeaf, check_tree, dtypes_of, stored_leaves
from jaxinfer.io.tokenizer import Tokenizer, has_tokenizer
from jaxinfer.io.weights import parameter_shapes
from jaxinfer.models.params import named_leaves
from jaxinfer.models.part import leaves_of_part
from jaxinfer.models.registry import family_for
from jaxinfer.runtime.backend import Backend
from jaxinfer.sparsity.heads import arranged
from jaxinfer.sparsity.stored import described, with_sparse_parts
from jaxinfer.typing import Json, Params

FORMAT = "jaxinfer"
WHAT = "a jaxinfer checkpoint"
MAX_CONFIG = 4 * 2**20
"""Bytes of a config.json; real ones have some thousand."""

VERSION = 3  # 2: weights [outputs, inputs]; 3: a dtype per array, int8 rows, sparse parts
READ = (2, 3)
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
    versions = READ if current else (data.get("format_version"),)
    return data.get("format") == FORMAT and data.get("format_version") in versions


def save_checkpoint(
    folder: str | Path, checkpoint: Checkpoint, *, overwrite: bool = False, int8_rows: bool = False
) -> None:
    """Write `checkpoint` to `folder`, which appears whole or not at all.

    Args:
      folder: absent or empty; with `overwrite` also one that holds an older checkpoint.
      checkpoint: what is written.
      overwrite: replace a checkpoint that is there, but never any other folder.
      int8_rows: round matrices to 8 bits with a scale per row, about one byte per parameter. They
        come back as floating numbers, and saving those again changes nothing.

    Raises:
      ValueError: the folder is taken, or the parameters are not those of the config.
    """
    folder = Path(folder)
    check_destination(folder, is_checkpoint, WHAT, overwrite=overwrite)
    params, sparse = arranged(checkpoint.params, Backend()), described(checkpoint.params)
    dtype, own = dtypes_of(params)
    check_tree(params, _shapes(checkpoint.config, BY_NAME[dtype], sparse))
    arrays = named_leaves(params)
    with replacing_folder(folder) as temporary:
        config = {
            "format": FORMAT,
            "format_version": VERSION,
            "dtype": dtype,
            "dtypes": own,
            "int8_rows": int8_rows,
            "sparse": sparse,
            "model": checkpoint.config.to_dict(),
        }
        orbax.save_arrays(temporary / "params", encoded(arrays) if int8_rows else arrays)
        if checkpoint.tokenizer is not None:
            checkpoint.tokenizer.save(temporary)
        write_json(temporary / "provenance.json", _with_record(checkpoint.provenance))
        write_json(temporary / "config.json", config)


def load_checkpoint_folder(
    folder: str | Path, dtype: DType = None, layers: range | None = None
) -> Checkpoint:
    """The checkpoint in a folder of our format, cast to `dtype` (None: the backend's default); with
    `layers` only the parameters that these need."""
    folder = Path(folder)
    data = _description(folder)
    config = _config(data.get("model"), folder)
    try:
        shapes, leaves = _expected(config, data, resolve_dtype(dtype))
    except ValueError as error:
        raise ValueError(f"{folder}: config.json is wrong: {one_line(error)}") from error
    wanted, made = leaves_of_part(
        config, shapes, range(config.num_layers) if layers is None else layers
    )
    names = list(leaves)
    found = orbax.load_arrays(folder / "params", {names[i]: leaves[names[i]] for i in wanted})
    params = made(list(found.values()))
    tokenizer = Tokenizer.load(folder) if has_tokenizer(folder) else None
    path = folder / "provenance.json"
    provenance = read_json(path) if path.is_file() else {}
    return Checkpoint(config, arranged(params), tokenizer, provenance)


def checkpoint_config(folder: Path) -> ModelConfig:
    """The model's configuration alone."""
    return _config(_description(folder).get("model"), folder)


def _description(folder: Path) -> Json:
    data = read_json(folder / "config.json", MAX_CONFIG)
    if data.get("format") != FORMAT:
        raise ValueError(f"{folder} is not a {FORMAT} checkpoint; its config.json lacks the format")
    if data.get("format_version") not in READ:
        raise ValueError(
            f"{folder} has format version {quoted(data.get('format_version'))}; this release reads "
            f"{' and '.join(map(str, READ))}; convert the model again"
        )
    return data


def _expected(
    cfg: ModelConfig, data: Json, dtype: np.dtype
) -> tuple[Params, dict[str, StoredLeaf]]:
    """The tree of shapes and the arrays that a description promises."""
    stored = data.get("dtype")
    if not isinstance(stored, str):
        raise ValueError("it lacks 'dtype'")
    shapes = _shapes(cfg, dtype, data.get("sparse"))
    own, int8_rows = data.get("dtypes", {}), data.get("int8_rows", False)
    return shapes, stored_leaves(shapes, resolve_dtype(stored), dtype, own, int8_rows)


def _shapes(cfg: ModelConfig, dtype: np.dtype, sparse: object) -> Params:
    return with_sparse_parts(cfg, parameter_shapes(cfg, dtype), sparse)


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
