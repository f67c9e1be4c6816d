"""The model families by Hugging Face model type.

`config_from_hf` turns a parsed config.json into a `ModelConfig`; `family_for` gives the parameter
sources. A new family is one file with a `FAMILY` and one line here, or a package that registers it.
"""

import reprlib
from collections.abc import Iterable
from typing import NoReturn

from jaxinfer.config import ModelConfig
from jaxinfer.files import quoted
from jaxinfer.models import (
    falcon,
    gpt2,
    gpt_neox,
    llama,
    mistral,
    mpt,
    opt,
    qwen2,
    qwen3,
    stripedhyena,
)
from jaxinfer.models.family import Family
from jaxinfer.models.nearest import nearest
from jaxinfer.plugins import Registry


def _no_layout(given: object) -> NoReturn:
    raise ValueError(
        "model type 'hyena' has no Hugging Face layout; load a folder that jaxinfer has written"
    )


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
    stripedhyena.FAMILY,
)
_WITHOUT_LAYOUT = Family(
    name="hyena", model_types=("hyena",), config_from_hf=_no_layout, sources=_no_layout
)
"""Models of long convolutions (`jaxinfer.models.hyena`), which only our own folders hold."""

_BY_TYPE: Registry[Family] = Registry(
    "model family",
    "jaxinfer.families",
    {kind: family for family in (*FAMILIES, _WITHOUT_LAYOUT) for kind in family.model_types},
)


def register_family(family: Family) -> None:
    """Lets `load` read checkpoints of another family, by the model types that it names.

    An installed package does the same with an entry point of the group `jaxinfer.families` for
    each model type, which names the `Family`.

    Raises:
        ValueError: for a model type that another family has.
    """
    for kind in family.model_types:
        _BY_TYPE.register(kind, family)


def family_for(model_type: object, settings: Iterable[str] = ()) -> Family:
    """The family of a config.json's `model_type`, which is also `ModelConfig.family`.

    Args:
        model_type: what the file says.
        settings: the names of its other settings, by which an unknown type is told its nearest.

    Raises:
        ValueError: the type is unknown; the line names the nearest that is known.
    """
    family = _BY_TYPE.find(model_type) if isinstance(model_type, str) else None
    if family is None:
        known = sorted(_BY_TYPE.names())
        near = nearest(model_type, known, settings) if isinstance(model_type, str) else "llama"
        raise ValueError(
            f"model type {quoted(model_type, 40)} is not implemented; known are {known}; "
            f"its closest supported family is {near}"
        )
    return family


def config_from_hf(hf: object) -> ModelConfig:
    """The `ModelConfig` of a parsed config.json; ValueError for all that is wrong or missing."""
    if not isinstance(hf, dict) or hf.get("model_type") is None:
        raise ValueError(
            f"expected a config.json dictionary with 'model_type', got {reprlib.repr(hf)}; "
            f"known model types are {sorted(_BY_TYPE.names())}"
        )
    return family_for(hf["model_type"], hf).config_from_hf(hf)
