"""The model families by Hugging Face model type.

`config_from_hf` turns a parsed config.json into a `ModelConfig`; `family_for` gives the parameter
sources. A new family is one file with a `FAMILY` and one line here.
"""

import reprlib
from typing import Any

from jaxinfer.config import ModelConfig
from jaxinfer.models import falcon, gpt2, gpt_neox, llama, mistral, mpt, opt, qwen2, qwen3
from jaxinfer.models.family import Family

FAMILIES: tuple[Family, ...] = (
    llama.FAMILY,
    mistral.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    opt.FAMILY,
    gpt2.FAMILY,
    gpt_neox.FAMILY,
    falcon.FAMILY,
    mpt.FAMILY,
)
_BY_TYPE = {kind: family for family in FAMILIES for kind in family.model_types}


def family_for(model_type: Any) -> Family:
    """The family of a config.json's `model_type`, which is also `ModelConfig.family`."""
    if not isinstance(model_type, str) or model_type not in _BY_TYPE:
        raise ValueError(
            f"model type {reprlib.repr(model_type)} is not implemented; "
            f"known are {sorted(_BY_TYPE)}"
        )
    return _BY_TYPE[model_type]


def config_from_hf(hf: Any) -> ModelConfig:
    """The `ModelConfig` of a parsed config.json; ValueError for all that is wrong or missing."""
    if not isinstance(hf, dict) or hf.get("model_type") is None:
        raise ValueError(
            f"expected a config.json dictionary with 'model_type', got {reprlib.repr(hf)}; "
            f"known model types are {sorted(_BY_TYPE)}"
        )
    return family_for(hf["model_type"]).config_from_hf(hf)
