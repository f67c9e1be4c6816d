"""The policies that the cache tests run over. A new policy adds one line to `MATRIX`.

`easy` is a setting that loses nothing within 64 tokens: it must equal the plain forward pass.
`hard` is one that evicts, packs or approximates within 20 tokens: it is compared with itself in
other chunkings, batches and trees. `bytes_per_row` is the documented formula of the allocated bytes
of one row and layer.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp

from jaxinfer.cache.base import Geometry, Policy
from jaxinfer.cache.presets import full
from tests.factories import MODELS


@dataclass(frozen=True)
class Case:
    easy: Callable[[], Policy]
    hard: Callable[[], Policy]
    bytes_per_row: Callable[[Policy, Geometry], int]
    refuses: tuple[str, ...] = ()  # models of tests/factories.py that it does not serve

    @property
    def name(self) -> str:
        return self.easy().name


def full_bytes(policy: Policy, geometry: Geometry) -> int:
    item = jnp.dtype(geometry.dtype).itemsize
    return 2 * geometry.num_kv_heads * geometry.head_dim * geometry.capacity * item


MATRIX = (Case(easy=full, hard=full, bytes_per_row=full_bytes),)

# Full on these two models, a smoke test on the others.
MAIN_MODELS = ("llama", "mpt")


def settings() -> list[tuple[str, str, Policy]]:
    """(model, "policy-setting", policy) of every combination; equal settings appear once."""
    out = []
    for case in MATRIX:
        made = {"easy": case.easy(), "hard": case.hard()}
        if made["easy"] == made["hard"]:
            del made["hard"]
        for model in MODELS:
            if model not in case.refuses:
                out += [(model, f"{case.name}-{name}", policy) for name, policy in made.items()]
    return out
