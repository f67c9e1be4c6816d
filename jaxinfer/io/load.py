"""Reading a checkpoint: by model name, from a Hugging Face folder, a GGUF file or our folder."""

import os
from pathlib import Path
from typing import Any

from jaxinfer.io.checkpoint import Checkpoint, is_checkpoint, load_checkpoint_folder
from jaxinfer.io.dtypes import resolve_dtype
from jaxinfer.io.weights import Progress, build_params


def load_checkpoint(
    source: str | os.PathLike, dtype: Any = None, progress: Progress | None = None
) -> Checkpoint:
    """Config, parameters (in `dtype`), tokenizer and provenance of `source`."""
    wanted = resolve_dtype(dtype)
    path = resolve(source)
    if path.is_file():
        return _from_gguf(path, wanted, progress)
    if is_checkpoint(path):
        return load_checkpoint_folder(path, wanted)
    from jaxinfer.io.hf import load_hf_folder

    return load_hf_folder(path, wanted, progress)


def resolve(source: str | os.PathLike) -> Path:
    """The file or folder that `source` means; a model-index name is fetched if need be."""
    from jaxinfer.io.fetch import model_folder
    from jaxinfer.io.model_index import MODELS

    text = os.fspath(source)
    if not isinstance(text, str) or not text or "\0" in text:
        raise ValueError(
            f"a model is a name or a path, got {source!r}; known names: {list(MODELS)}"
        )
    if text in MODELS:
        return model_folder(text)
    path = Path(os.path.expanduser(text))
    try:
        exists = path.exists()
    except OSError as error:
        raise ValueError(f"{text[:80]!r} is not a usable path: {error.strerror}") from error
    if not exists:
        raise ValueError(
            f"no model {text!r}: not one of {', '.join(MODELS)} and not a file or folder; "
            "give a model name, a Hugging Face folder, a GGUF file or a converted folder"
        )
    return path


def _from_gguf(path: Path, dtype: Any, progress: Progress | None) -> Checkpoint:
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise ValueError(
            f"{path} is a PyTorch pickle, which can run code when opened; save the model with "
            "safe_serialization=True and load its safetensors folder"
        )
    if path.suffix == ".safetensors":
        raise ValueError(
            f"{path} is one file of a Hugging Face folder; give the folder {path.parent}"
        )
    from jaxinfer.io.gguf import GGUFFile
    from jaxinfer.io.gguf_tokenizer import tokenizer_from_metadata
    from jaxinfer.models.registry import family_for

    file = GGUFFile(path)
    try:
        config = file.config
        params = build_params(config, family_for(config.family), file, dtype, progress)
        tokenizer = tokenizer_from_metadata(file.metadata, str(path))
    finally:
        file.close()
    if tokenizer is not None:
        tokenizer = tokenizer.with_eos(config.eos_token_ids)
    provenance = {"source": path.name, "source_format": "gguf"}
    if isinstance(file.metadata.get("general.name"), str):
        provenance["source_name"] = file.metadata["general.name"]
    return Checkpoint(config, params, tokenizer, provenance)
