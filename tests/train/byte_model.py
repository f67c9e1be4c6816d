"""A model of bytes that has learned Python's own source, for what only a converged model shows."""

import sysconfig
from pathlib import Path

import jax
import numpy as np

from jaxinfer.config import ModelConfig, RopeConfig
from jaxinfer.lm import LM
from jaxinfer.models.params import init_params
from jaxinfer.train import optimizers
from jaxinfer.train.language_model import next_token_loss
from jaxinfer.train.loop import make_update, new_state

CONTEXT, BATCH = 64, 16
FILES = ("argparse.py", "ast.py", "inspect.py", "tarfile.py", "typing.py", "datetime.py",
         "pickle.py", "doctest.py", "zipfile.py", "subprocess.py")  # fmt: skip
HELD_OUT = ("difflib.py", "shutil.py")
CONFIGS = {
    activation: ModelConfig(
        family="llama",
        vocab_size=256,
        hidden_size=64,
        intermediate_size=256 if activation == "relu" else 192,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=32,
        max_positions=CONTEXT,
        rope=RopeConfig(rotary_dim=32),
        activation=activation,
        gated_mlp=activation != "relu",
        tie_embeddings=True,
    )
    for activation in ("relu", "silu")
}


def windows(files: tuple[str, ...], stride: int = CONTEXT) -> np.ndarray:
    """i32[Q, T+1] of the files' bytes, in order."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    data = np.frombuffer(b"".join((folder / name).read_bytes() for name in files), np.uint8)
    starts = range(0, len(data) - CONTEXT - 1, stride)
    return np.stack([data[i : i + CONTEXT + 1] for i in starts]).astype(np.int32)


def trained_model(activation: str = "relu", steps: int = 2000, seed: int = 0) -> LM:
    """A model trained on `FILES`."""
    cfg, texts = CONFIGS[activation], windows(FILES, stride=CONTEXT - 3)
    transform = optimizers.muon(optimizers.warmup_cosine(1e-2, steps, warmup=steps // 16))
    state = new_state(init_params(cfg, jax.random.key(seed)), transform, seed)
    update = make_update(next_token_loss(cfg), transform)
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        state, _ = update(state, texts[rng.integers(0, len(texts), BATCH)])
    return LM(cfg, state.params, name=f"bytes-{activation}")
