"""A very small training run as a program, so that tests can kill it: `tiny_run.py FOLDER STEPS`."""

import sys
from pathlib import Path

import jax
import optax

from jaxinfer.config import ModelConfig, RopeConfig
from jaxinfer.models.params import init_params
from jaxinfer.train.data import TokenWindows, write_tokens
from jaxinfer.train.language_model import next_token_loss
from jaxinfer.train.loop import TrainState, fit
from jaxinfer.train.optimizers import adamw, warmup_cosine
from jaxinfer.typing import Params

CONFIG = ModelConfig(
    family="llama",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=32,
    rope=RopeConfig(rotary_dim=8),
    tie_embeddings=True,
)


def start() -> Params:
    return init_params(CONFIG, jax.random.key(0))


def transform() -> optax.GradientTransformation:
    return adamw(warmup_cosine(1e-2, 1000, warmup=10))


def run(folder: Path, steps: int, save_every: int = 4) -> TrainState:
    """Trains on a counting sequence; the schedule does not depend on `steps`."""
    tokens = folder / "tokens.bin"
    if not tokens.is_file():
        write_tokens(tokens, [[(3 * i + i // 7) % 63 + 1 for i in range(3000)]], end=0)
    return fit(
        next_token_loss(CONFIG),
        start(),
        transform(),
        TokenWindows(tokens, length=16, batch_size=4, seed=1).batch,
        steps=steps,
        folder=folder,
        save_every=save_every,
        log_every=1,
    )


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]))
