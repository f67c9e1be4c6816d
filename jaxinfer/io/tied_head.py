"""Tied output heads: what a checkpoint stores beats what its config says, as in transformers 5.

A config that ties the head to the embedding is believed where the file holds one of the two, either
one, or both with the same values. A head of other values is the model's own.
"""

import dataclasses
import warnings
from typing import TYPE_CHECKING

import numpy as np

from jaxinfer.config import ModelConfig
from jaxinfer.models.family import Family, Source, Sources

if TYPE_CHECKING:
    from jaxinfer.io.weights import TensorStore

ROWS = 4096
TOKENS, HEAD = ("embed", "tokens"), ("head", "weight")


def config_as_stored(cfg: ModelConfig, family: Family, store: "TensorStore") -> ModelConfig:
    """`cfg`, untied with a warning where `store` holds a head that differs from the embedding."""
    head = _head(cfg, family)
    if not cfg.tie_embeddings or head is None:
        return cfg
    tokens = family.find(family.sources(cfg)[TOKENS], store)
    name = family.find(head, store)
    if tokens is None or name is None or _equal(store, tokens, name):
        return cfg
    warnings.warn(
        f"{store.where}: the config ties the head to the embedding, the file holds another head "
        f"({name}), which is used; set tie_word_embeddings to false in the config",
        stacklevel=3,
    )
    return dataclasses.replace(cfg, tie_embeddings=False)


def sources_as_stored(cfg: ModelConfig, family: Family, store: "TensorStore") -> Sources:
    """The family's sources; the embedding comes from the head where only that is stored.

    Raises:
      ValueError: the config asks for a head of its own and there is none.
    """
    sources, head = family.sources(cfg), _head(cfg, family)
    if head is None or family.find(head, store) is not None:
        if head is not None and cfg.tie_embeddings and family.find(sources[TOKENS], store) is None:
            return sources | {TOKENS: head}
        return sources
    if not cfg.tie_embeddings:
        raise ValueError(
            f"{store.where} lacks tensor {head.name!r}, the head; if the embedding serves as the "
            "head, set tie_word_embeddings to true in the config; else the checkpoint is incomplete"
        )
    return sources


def _head(cfg: ModelConfig, family: Family) -> Source | None:
    return family.sources(dataclasses.replace(cfg, tie_embeddings=False)).get(HEAD)


def _equal(store: "TensorStore", first: str, second: str) -> bool:
    if store.shape(first) != store.shape(second):
        return False
    a, b = store.read(first), store.read(second)
    equal = all(np.array_equal(a[i : i + ROWS], b[i : i + ROWS]) for i in range(0, len(a), ROWS))
    store.release(first)
    store.release(second)
    return equal
