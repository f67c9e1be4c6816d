"""Tiny random language models, one per kind of architecture; none needs a file or a tokenizer.

Everything is cached: checks that use the same model share its compiled programs.
"""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.config import ModelConfig, RopeConfig
from jaxinfer.lm import LM
from jaxinfer.models.params import init_params
from jaxinfer.nn.alibi import mpt_slopes
from jaxinfer.typing import Params

BASE = ModelConfig(
    family="llama",
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=4096,
    rope=RopeConfig(rotary_dim=8),
)
LAYER_NORM: dict[str, Any] = {
    "norm": "layer", "norm_bias": True, "activation": "gelu", "gated_mlp": False,
}  # fmt: skip
CONFIGS = {
    "llama": BASE,
    "mpt": replace(
        BASE,
        family="mpt",
        norm="layer",
        activation="gelu",
        gated_mlp=False,
        positions="alibi",
        rope=None,
        alibi_slopes=mpt_slopes(4),
        num_kv_heads=4,
    ),
    "learned": replace(
        BASE,
        family="opt",
        positions="learned",
        rope=None,
        position_offset=2,
        max_positions=64,
        num_kv_heads=4,
        qkv_bias=True,
        tie_embeddings=True,
        **LAYER_NORM,
    ),
    "parallel": replace(
        BASE,
        family="falcon",
        parallel_block=True,
        shared_norm=True,
        num_kv_heads=1,
        rope=RopeConfig(rotary_dim=4),
        **LAYER_NORM,
    ),
    "sliding": replace(
        BASE, family="mistral", sliding_windows=(7, None), attention_softcap=20.0, qk_norm=True
    ),
}


@functools.cache
def params_of(name: str, dtype: str = "float32", seed: int = 0) -> Params:
    """Random parameters, louder than at the start of training so that attention matters."""
    return _loud_params(CONFIGS[name], jax.random.key(seed), dtype)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _loud_params(cfg: ModelConfig, key: jax.Array, dtype: str) -> Params:
    params = init_params(cfg, key, jnp.dtype(dtype))
    return jax.tree.map(lambda x: 2 * x if x.ndim == 2 else x, params)


@functools.cache
def tiny_model(name: str = "llama", dtype: str = "float32", seed: int = 0) -> LM:
    """A random model of two layers and 61 tokens, without a tokenizer.

    Args:
        name: the architecture, one of `CONFIGS`: "llama" (grouped queries, rotary positions), "mpt"
            (ALiBi), "learned" (learned positions), "parallel" (parallel blocks, one key head) or
            "sliding" (a sliding window in one layer).
        dtype: of its parameters.
        seed: of its parameters.

    Returns:
        The `LM`; the same one for the same arguments.
    """
    return LM(CONFIGS[name], params_of(name, dtype, seed), name=name)


def random_tokens(batch: int, size: int, seed: int = 0, vocab: int = BASE.vocab_size) -> np.ndarray:
    """i32[batch, size]."""
    return np.random.default_rng(seed).integers(0, vocab, (batch, size)).astype(np.int32)
