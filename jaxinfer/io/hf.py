"""Hugging Face folders as checkpoints: config, safetensors, tokenizer, generation_config."""

import dataclasses
import reprlib
import warnings
from pathlib import Path

import numpy as np

from jaxinfer.config import MOST_ENDS, ModelConfig
from jaxinfer.files import read_json
from jaxinfer.io.checkpoint import MAX_CONFIG, Checkpoint
from jaxinfer.io.safetensors_reader import Safetensors
from jaxinfer.io.tied_head import config_as_stored
from jaxinfer.io.tokenizer import Tokenizer, compare_vocabularies, has_tokenizer
from jaxinfer.io.weights import Progress, build_params
from jaxinfer.models.registry import config_from_hf, family_for
from jaxinfer.typing import Json


def load_hf_folder(
    folder: str | Path,
    dtype: np.dtype,
    progress: Progress | None = None,
    layers: range | None = None,
) -> Checkpoint:
    """The checkpoint in a Hugging Face folder, parameters (all, or what some layers need) cast to
    `dtype`."""
    folder = Path(folder)
    hf = read_hf_config(folder)
    config = with_generation_ids(config_from_hf(hf), hf, folder)
    # the tokenizer first: it fails in milliseconds where weights take minutes
    tokenizer = Tokenizer.load(folder) if has_tokenizer(folder) else None
    if tokenizer is None:
        warnings.warn(f"{folder} has no tokenizer; prompts must be token lists", stacklevel=2)
    else:
        tokenizer = tokenizer.with_eos(config.eos_token_ids)
        compare_vocabularies(tokenizer, config.vocab_size, folder)
    store = Safetensors(folder)
    try:
        family = family_for(hf["model_type"])
        config = config_as_stored(config, family, store)
        params = build_params(config, family, store, dtype, progress, layers)
    finally:
        store.close()
    provenance = {"source": folder.resolve().name, "source_format": "huggingface"}
    return Checkpoint(config, params, tokenizer, provenance)


def read_hf_config(folder: Path) -> Json:
    """The parsed config.json; ValueError if `folder` is not a model folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} is not a model: it has no config.json; give a Hugging Face folder, a "
            "converted folder or a GGUF file"
        )
    return read_json(path, MAX_CONFIG)


def with_generation_ids(config: ModelConfig, hf: Json, folder: Path) -> ModelConfig:
    """`config` with the ids that start and end a text, by the rule of transformers 5.

    Where there is a generation_config.json it alone names them, else config.json; neither file
    inherits the defaults of the model's family.
    """
    path = folder / "generation_config.json"
    beside = read_json(path, MAX_CONFIG) if path.is_file() else None
    named = hf if beside is None else beside
    stops = _ids(named.get("eos_token_id"), f"{path}: eos_token_id")
    starts = _ids(named.get("bos_token_id"), f"{path}: bos_token_id")
    known = tuple(number for number in dict.fromkeys(stops) if 0 <= number < config.vocab_size)
    lost = _ids(hf.get("eos_token_id"), f"{folder}: eos_token_id")
    if beside is not None and not stops and lost:
        warnings.warn(
            f"{path} names no eos_token_id, so texts do not end at {list(lost)[:8]}, which "
            "config.json names; add it there, or give stop strings",
            stacklevel=3,
        )
    # a vocabulary may have been cut below an id that a file still names
    start = next((number for number in starts if 0 <= number < config.vocab_size), None)
    return dataclasses.replace(config, bos_token_id=start, eos_token_ids=known)


def _ids(value: object, what: str) -> list[int]:
    found = [] if value is None else value if isinstance(value, list) else [value]
    ids = [number for number in found if type(number) is int]
    if len(found) > MOST_ENDS or len(ids) < len(found):
        raise ValueError(f"{what} must be ids, got {reprlib.repr(value)}")
    return ids
