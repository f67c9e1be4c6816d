"""Small models, windows and recipes for what LTE's tests train."""

from dataclasses import replace

import jax
import numpy as np

from jaxinfer.lm import LM
from jaxinfer.models.params import init_params
from jaxinfer.train.lte.recipe import preset
from tests.factories import CONFIGS

SIZE = 16  # neurons of a block
SIZES = {"hidden_size": 32, "intermediate_size": 64, "mlp_bias": False}
TOYS = {
    "gated": replace(CONFIGS["llama"], **SIZES),
    "plain": replace(CONFIGS["learned"], **SIZES | {"mlp_bias": True}, activation="relu"),
}
SHORT = {"block_size": SIZE, "steps": 24, "adapt_steps": 12, "batch": 4}


def toy(kind: str = "gated", seed: int = 0) -> LM:
    cfg = TOYS[kind]
    return LM(cfg, init_params(cfg, jax.random.key(seed)), name=f"toy-{kind}")


def counting(rows: int, size: int = 25, seed: int = 0) -> np.ndarray:
    """i32[rows, size]: each row counts in steps of its own, which a small model soon learns."""
    rng = np.random.default_rng(seed)
    start, step = rng.integers(0, 61, (rows, 1)), rng.integers(1, 5, (rows, 1))
    return ((start + step * np.arange(size)) % 61).astype(np.int32)


TEXT, HELD_OUT = counting(48), counting(12, seed=1)


def recipe(name: str = "ste", **changes):
    return preset(name, **(SHORT | {"learning_rate": 1e-2} | changes))
