"""The models that requests and artefacts are for."""

import functools
from pathlib import Path

import jaxinfer as ji
from jaxinfer.lm import LM
from jaxinfer.testing.models import tiny_model

ROOT = Path(__file__).parents[3]


@functools.cache
def random_lm() -> LM:
    """A model of two layers and 61 tokens, without a tokenizer."""
    return tiny_model("llama")


@functools.cache
def real_lm() -> LM:
    """The small model that comes with the library, with a tokenizer."""
    return ji.load("tiny-llama")
