"""The decoder-only transformer and the families it covers.

What a family of your own needs: `Family`, `Source` and `register_family`; a token mixer of your
own: `Mixer` and `register_mixer`.
"""

from jaxinfer.config import ModelConfig, RopeConfig
from jaxinfer.models.family import Family, Source
from jaxinfer.models.mixer import Mixer
from jaxinfer.models.mixers import register_mixer
from jaxinfer.models.params import abstract_params, init_params
from jaxinfer.models.registry import config_from_hf, family_for, register_family
from jaxinfer.models.shapes import abstract_linear, abstract_norm
from jaxinfer.models.stack import (
    Output,
    cache_bytes_per_row,
    cache_geometry,
    commit,
    forward,
    grow_cache,
    init_cache,
)

__all__ = [
    "Family",
    "Mixer",
    "ModelConfig",
    "Output",
    "RopeConfig",
    "Source",
    "abstract_linear",
    "abstract_norm",
    "abstract_params",
    "cache_bytes_per_row",
    "cache_geometry",
    "commit",
    "config_from_hf",
    "family_for",
    "forward",
    "grow_cache",
    "init_cache",
    "init_params",
    "register_family",
    "register_mixer",
]
