"""Hugging Face folders as checkpoints: config, safetensors, tokenizer, generation_config."""

import dataclasses
import warnings
from pathlib import Path

import numpy as np

from jaxinfer.files import one_line, read_json
from jaxinfer.io.checkpoint import Checkpoint
from jaxinfer.io.safetensors_reader import Safetensors
from jaxinfer.io.tokenizer import Tokenizer, compare_vocabularies, has_tokenizer
from jaxinfer.io.weights import Progress, build_params
from jaxinfer.models.registry import config_from_hf, family_for
from jaxinfer.typing import Json


def load_hf_folder(
    folder: str | Path, dtype: np.dtype, progress: Progress | None = None
) -> Checkpoint:
    """The checkpoint in a Hugging Face folder, parameters cast to `dtype`."""
    folder = Path(folder)
    hf = read_hf_config(folder)
    config = config_from_hf(hf)
    stops = generation_eos(folder, config.vocab_size)
    if stops:
        config = dataclasses.replace(
            config, eos_token_ids=tuple(dict.fromkeys(stops + config.eos_token_ids))
        )
    # the tokenizer first: it fails in milliseconds where weights take minutes
    tokenizer = Tokenizer.load(folder) if has_tokenizer(folder) else None
    if tokenizer is None:
        warnings.warn(f"{folder} has no tokenizer; prompts must be token lists", stacklevel=2)
    else:
        tokenizer = tokenizer.with_eos(config.eos_token_ids)
        compare_vocabularies(tokenizer, config.vocab_size, folder)
    store = Safetensors(folder)
    try:
        params = build_params(config, family_for(hf["model_type"]), store, dtype, progress)
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
    return read_json(path)


def generation_eos(folder: Path, vocab_size: int) -> tuple[int, ...]:
    """The ids that end a text according to generation_config.json, if it has any."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return ()
    value = read_json(path).get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(type(number) is not int for number in ids):
        raise ValueError(f"{path}: eos_token_id must be ids, got {one_line(repr(value), 60)}")
    # a vocabulary may have been cut below an id that generation_config still names
    return tuple(number for number in ids if 0 <= number < vocab_size)
