"""`read_checkpoint`: what is at a path (our own folder, a Hugging Face folder, a GGUF file).

Names of models are not known here: `jaxinfer.io.load` finds their paths, fetching them if need be.
"""

import dataclasses
from pathlib import Path

import numpy as np

from jaxinfer.config import ModelConfig
from jaxinfer.io.checkpoint import Checkpoint, is_checkpoint, load_checkpoint_folder
from jaxinfer.io.dtypes import DType, resolve_dtype
from jaxinfer.io.gguf import GGUFFile
from jaxinfer.io.gguf_tokenizer import tokenizer_from_metadata
from jaxinfer.io.hf import load_hf_folder
from jaxinfer.io.tokenizer import Tokenizer, compare_vocabularies
from jaxinfer.io.weights import Progress, build_params
from jaxinfer.models.registry import family_for


def read_checkpoint(
    path: str | Path,
    dtype: DType = None,
    progress: Progress | None = None,
    layers: range | None = None,
) -> Checkpoint:
    """Config, parameters (in `dtype`), tokenizer and provenance of the checkpoint at `path`.

    Args:
      path: a file or folder that exists.
      dtype: "float32", "bfloat16" or "float16"; None is float32 on CPU, bfloat16 on a GPU.
      progress: called as `progress(done, total)` while parameters are read.
      layers: read only the parameters that these need (`jaxinfer.models.part`); None reads all.

    Raises:
      ValueError: one line on what is wrong with the checkpoint and what to do.
    """
    path, wanted = Path(path), resolve_dtype(dtype)
    if path.is_file():
        return _read_gguf(path, wanted, progress, layers)
    if is_checkpoint(path):
        return load_checkpoint_folder(path, wanted, layers)
    return load_hf_folder(path, wanted, progress, layers)


def ending_with(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The configuration whose texts also end where `tokenizer` knows that they do."""
    known = [number for number in tokenizer.eos_token_ids if number < config.vocab_size]
    ends = tuple(dict.fromkeys((*config.eos_token_ids, *known)))
    return dataclasses.replace(config, eos_token_ids=ends)


def _read_gguf(
    path: Path, dtype: np.dtype, progress: Progress | None, layers: range | None
) -> Checkpoint:
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise ValueError(
            f"{path} is a PyTorch pickle, which can run code when opened; save the model with "
            "safe_serialization=True and load its safetensors folder"
        )
    if path.suffix == ".safetensors":
        raise ValueError(
            f"{path} is one file of a Hugging Face folder; give the folder {path.parent}"
        )
    file = GGUFFile(path)
    try:
        config = file.config
        # the tokenizer first: it fails in milliseconds where weights take minutes
        tokenizer = tokenizer_from_metadata(file.metadata, str(path))
        if tokenizer is not None:
            tokenizer = tokenizer.with_eos(config.eos_token_ids)
            config = ending_with(config, tokenizer)
            compare_vocabularies(tokenizer, config.vocab_size, path)
        params = build_params(config, family_for(config.family), file, dtype, progress, layers)
    finally:
        file.close()
    provenance = {"source": path.name, "source_format": "gguf"}
    if isinstance(file.metadata.get("general.name"), str):
        provenance["source_name"] = file.metadata["general.name"]
    return Checkpoint(config, params, tokenizer, provenance)
