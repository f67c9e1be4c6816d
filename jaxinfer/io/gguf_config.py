"""GGUF metadata as the Hugging Face config.json of the same model.

One function for each architecture; all that a family's `config_from_hf` reads is given explicitly.
Llama 3's rotary scaling has no metadata of its own: llama.cpp stores the per-frequency divisors as
the tensor rope_freqs, from which the published parameters are recognised.
"""

import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import numpy as np

from jaxinfer.files import quoted
from jaxinfer.models.nearest import nearest
from jaxinfer.typing import Json

Shapes = Mapping[str, tuple[int, ...]]
ENDS = ("eos", "eot", "eom")


def hf_config(metadata: Json, shapes: Shapes, rope_factors: np.ndarray | None, where: str) -> Json:
    """The config of a known architecture; ValueError names a missing key or the architecture."""
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = sorted(ARCHITECTURES)
        near = nearest(name, known) if isinstance(name, str) else "llama"
        raise ValueError(
            f"{where}: architecture {quoted(name, 40)} is not implemented for GGUF; known are "
            f"{known}; its closest supported family is {near}"
        )
    reader = _Reader(name, metadata, shapes, rope_factors, where)
    reader.check_blocks()
    config = ARCHITECTURES[name](reader)
    if scaling := _rope_scaling(reader, config):
        config["rope_scaling"] = scaling
    ids = {key: metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", *ENDS)}
    config["bos_token_id"] = ids["bos"]
    # as in llama.cpp, the ends of a turn and of a message end a text too
    config["eos_token_id"] = [ids[key] for key in ENDS if ids[key] is not None]
    return config


class _Reader:
    """Metadata of one architecture: `get("block_count")` reads "llama.block_count"."""

    def __init__(
        self, name: str, metadata: dict, shapes: Shapes, factors: np.ndarray | None, where: str
    ):
        self.name, self.metadata, self.shapes = name, metadata, shapes
        self.factors, self.where = factors, where

    def get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(f"{self.name}.{key}", default)

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer; a list of equal ones (one a layer) counts as one."""
        value = self.get(key, default)
        if value is None:
            raise ValueError(f"{self.where}: metadata '{self.name}.{key}' is missing")
        if isinstance(value, list) and value and all(entry == value[0] for entry in value):
            value = value[0]
        if type(value) is not int or value <= 0:
            self.refuse(key, value, "one positive integer for all layers")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number, as the shortest decimal of its float32 (1e-5, not 9.99999974e-06)."""
        value = self.get(key, default)
        if value is None:
            raise ValueError(f"{self.where}: metadata '{self.name}.{key}' is missing")
        if type(value) not in (int, float) or not math.isfinite(value):
            self.refuse(key, value, "a finite number")
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def check_blocks(self) -> None:
        """Refuses more blocks than there are tensors of: tables are built for every block."""
        count = self.size("block_count")
        if not any(name.startswith(f"blk.{count - 1}.") for name in self.shapes):
            raise ValueError(
                f"{self.where}: metadata '{self.name}.block_count' is {count}, but there is no "
                f"tensor of block {count - 1}; is the file complete?"
            )

    def refuse(self, key: str, value: Any, expected: str) -> NoReturn:
        raise ValueError(
            f"{self.where}: metadata '{self.name}.{key}' is {reprlib.repr(value)}, "
            f"expected {expected}"
        )

    @property
    def vocab_size(self) -> int:
        shape = self.shapes.get("token_embd.weight")
        if shape is None:
            raise ValueError(f"{self.where}: tensor 'token_embd.weight' is missing")
        return shape[0]

    @property
    def tied(self) -> bool:
        return "output.weight" not in self.shapes

    def has(self, suffix: str) -> bool:
        return f"blk.0.{suffix}" in self.shapes


def _llama(gguf: _Reader) -> Json:
    heads, width = gguf.size("attention.head_count"), gguf.size("embedding_length")
    if gguf.get("expert_count"):
        raise ValueError(f"{gguf.where}: mixture-of-experts models are not implemented")
    head_dim = gguf.size("attention.key_length", max(1, width // heads))
    config = {
        "model_type": gguf.name,
        "vocab_size": gguf.vocab_size,
        "hidden_size": width,
        "intermediate_size": gguf.size("feed_forward_length"),
        "num_hidden_layers": gguf.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": gguf.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": gguf.size("context_length"),
        "rms_norm_eps": gguf.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": gguf.number("rope.freq_base", 10000.0),
        "partial_rotary_factor": gguf.size("rope.dimension_count", head_dim) / head_dim,
        "tie_word_embeddings": gguf.tied,
    }
    window = gguf.get("attention.sliding_window")
    if gguf.name == "llama":
        config["attention_bias"] = gguf.has("attn_q.bias")
        config["mlp_bias"] = gguf.has("ffn_up.bias")
        if window:
            config |= {"model_type": "mistral", "sliding_window": window}
    elif window:
        config |= {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0}
    return config


def _rope_scaling(gguf: _Reader, config: Json) -> Json | None:
    """Hugging Face's `rope_scaling`, from the keys and defaults that llama.cpp reads.

    A factor without a type is linear, and `rope.scale_linear` is the factor's name in old files.
    """
    for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
        if (value := gguf.number(f"rope.scaling.{key}", 1.0)) != 1:
            gguf.refuse(f"rope.scaling.{key}", value, "1; other values are not implemented")
    kind = gguf.get("rope.scaling.type") or "linear"
    factor = gguf.number("rope.scaling.factor", gguf.number("rope.scale_linear", 0.0)) or 1.0
    if gguf.factors is not None:
        if kind != "none" and factor != 1:
            gguf.refuse("rope.scaling.factor", factor, "1 beside the tensor 'rope_freqs.weight'")
        return _llama3_scaling(gguf, config)
    if kind == "none" or (kind == "linear" and factor == 1):
        return None
    scaling = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        original = gguf.get("rope.scaling.original_context_length")
        scaling |= {
            "original_max_position_embeddings": original or gguf.size("context_length"),
            "beta_fast": gguf.number("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": gguf.number("rope.scaling.yarn_beta_slow", 1.0),
        }
    return scaling


def _llama3_scaling(gguf: _Reader, config: Json) -> Json:
    """The published Llama 3 parameters whose divisors equal the stored ones."""
    stored = np.asarray(gguf.factors, np.float64).reshape(-1)
    half = config["head_dim"] // 2
    if stored.size != half or not np.isfinite(stored).all() or stored.max() < 1:
        raise ValueError(f"{gguf.where}: tensor 'rope_freqs.weight' does not fit the head size")
    factor, theta, original = float(stored.max()), float(config["rope_theta"]), 8192
    wave = 2 * math.pi * theta ** (np.arange(half) / half)
    blend = np.clip((original / wave - 1.0) / (4.0 - 1.0), 0, 1)
    expected = 1 / ((1 - blend) / factor + blend)
    if not np.allclose(stored, expected, rtol=1e-3):
        raise ValueError(
            f"{gguf.where}: the divisors in 'rope_freqs.weight' are not those of llama3 scaling; "
            "other frequency tables are not implemented"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }


def _gpt2(gguf: _Reader) -> Json:
    return {
        "model_type": "gpt2",
        "vocab_size": gguf.vocab_size,
        "n_embd": gguf.size("embedding_length"),
        "n_layer": gguf.size("block_count"),
        "n_head": gguf.size("attention.head_count"),
        "n_inner": gguf.size("feed_forward_length"),
        "n_positions": gguf.size("context_length"),
        "layer_norm_epsilon": gguf.number("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
        "tie_word_embeddings": gguf.tied,
    }


def _gptneox(gguf: _Reader) -> Json:
    width, heads = gguf.size("embedding_length"), gguf.size("attention.head_count")
    return {
        "model_type": "gpt_neox",
        "vocab_size": gguf.vocab_size,
        "hidden_size": width,
        "intermediate_size": gguf.size("feed_forward_length"),
        "num_hidden_layers": gguf.size("block_count"),
        "num_attention_heads": heads,
        "max_position_embeddings": gguf.size("context_length"),
        "layer_norm_eps": gguf.number("attention.layer_norm_epsilon"),
        "rotary_pct": gguf.size("rope.dimension_count") / max(1, width // heads),
        "rotary_emb_base": gguf.number("rope.freq_base", 10000.0),
        "use_parallel_residual": gguf.get("use_parallel_residual", True),
        "attention_bias": gguf.has("attn_qkv.bias"),
        "hidden_act": "gelu",
        "tie_word_embeddings": gguf.tied,
    }


def _falcon(gguf: _Reader) -> Json:
    heads, kv_heads = gguf.size("attention.head_count"), gguf.size("attention.head_count_kv")
    two_norms = gguf.has("attn_norm_2.weight")
    return {
        "model_type": "falcon",
        "vocab_size": gguf.vocab_size,
        "hidden_size": gguf.size("embedding_length"),
        "num_hidden_layers": gguf.size("block_count"),
        "num_attention_heads": heads,
        "num_kv_heads": kv_heads,
        "multi_query": kv_heads == 1,
        # Falcon2-11B groups keys under one norm, Falcon-40B and 180B under two
        "new_decoder_architecture": two_norms or kv_heads not in (1, heads),
        "num_ln_in_parallel_attn": 2 if two_norms else 1,
        "ffn_hidden_size": gguf.size("feed_forward_length"),
        "max_position_embeddings": gguf.size("context_length"),
        "layer_norm_epsilon": gguf.number("attention.layer_norm_epsilon"),
        "rope_theta": gguf.number("rope.freq_base", 10000.0),
        "parallel_attn": True,
        "bias": gguf.has("attn_qkv.bias"),
        "alibi": False,
        "tie_word_embeddings": gguf.tied,
    }


def _mpt(gguf: _Reader) -> Json:
    return {
        "model_type": "mpt",
        "vocab_size": gguf.vocab_size,
        "d_model": gguf.size("embedding_length"),
        "n_layers": gguf.size("block_count"),
        "n_heads": gguf.size("attention.head_count"),
        "expansion_ratio": gguf.size("feed_forward_length") // gguf.size("embedding_length"),
        "max_seq_len": gguf.size("context_length"),
        "layer_norm_epsilon": gguf.number("attention.layer_norm_epsilon"),
        "attn_config": {
            "attn_type": "multihead_attention",
            "alibi": gguf.number("attention.max_alibi_bias", 0.0) > 0,
            "alibi_bias_max": gguf.number("attention.max_alibi_bias", 8.0),
            "clip_qkv": gguf.get("attention.clamp_kqv"),
        },
        "no_bias": not gguf.has("attn_qkv.bias"),
        "tie_word_embeddings": gguf.tied,
    }


ARCHITECTURES: dict[str, Callable[[_Reader], Json]] = {
    "llama": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "gpt2": _gpt2,
    "gptneox": _gptneox,
    "falcon": _falcon,
    "mpt": _mpt,
}
