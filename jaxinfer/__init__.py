"""Language-model inference in JAX.

Example:
    import jaxinfer as ji

    lm = ji.load("smollm2-135m")
    print(lm.generate("The capital of France is", max_new_tokens=16)[0].text)
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from jaxinfer.cache.policy import Policy
from jaxinfer.cache.presets import (
    PolicyLike,
    full,
    h2o,
    kivi,
    less,
    per_layer,
    register_policy,
    streaming,
)
from jaxinfer.config import ModelConfig, RopeConfig
from jaxinfer.decode.batcher import Batcher, QueueFull
from jaxinfer.decode.results import Completion, Stats
from jaxinfer.decode.sampling import Sampler
from jaxinfer.decode.scoring import Score
from jaxinfer.decode.stream import Stream
from jaxinfer.decode.ticket import Ticket
from jaxinfer.distill.filters.distill import distill_filters
from jaxinfer.distill.model import distill
from jaxinfer.io.convert import convert
from jaxinfer.lm import LM
from jaxinfer.loading import load, load_draft
from jaxinfer.models.family import Family
from jaxinfer.models.recurrent import RecurrentDraft
from jaxinfer.models.registry import register_family
from jaxinfer.models.stack import Output, commit, forward
from jaxinfer.names import DraftLike, SparsityLike, deja_vu, lte, register_sparsity
from jaxinfer.session import Session
from jaxinfer.sparsity.method import Sparsity
from jaxinfer.speculative import (
    Speculator,
    Topology,
    early_exit,
    expected_tokens,
    speculate,
)

if TYPE_CHECKING:
    from jaxinfer import theory as theory
    from jaxinfer.parallel import hexgen as hexgen

__version__ = "0.1.0"

__all__ = [
    "LM",
    "Batcher",
    "Completion",
    "DraftLike",
    "Family",
    "ModelConfig",
    "Output",
    "Policy",
    "PolicyLike",
    "QueueFull",
    "RecurrentDraft",
    "RopeConfig",
    "Sampler",
    "Score",
    "Session",
    "Sparsity",
    "SparsityLike",
    "Speculator",
    "Stats",
    "Stream",
    "Ticket",
    "Topology",
    "commit",
    "convert",
    "deja_vu",
    "distill",
    "distill_filters",
    "early_exit",
    "expected_tokens",
    "forward",
    "full",
    "h2o",
    "kivi",
    "less",
    "load",
    "load_draft",
    "lte",
    "per_layer",
    "register_family",
    "register_policy",
    "register_sparsity",
    "speculate",
    "streaming",
]

# most programs need none of them
_WHEN_USED = {"hexgen": "jaxinfer.parallel.hexgen", "theory": "jaxinfer.theory"}


def __getattr__(name: str) -> ModuleType:
    if name in _WHEN_USED:
        return importlib.import_module(_WHEN_USED[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHEN_USED})
