"""The models that benchmarks run on, and their weights as a Hugging Face folder for the peers.

"tiny-random" is a small Llama with random weights, for trying the benchmarks out, "opt-random" an
OPT of width 1024 with 8 layers, for the time of sparse blocks; any other name or path goes to
`jaxinfer.load`. Everything is float32, but for weights that are asked for in fewer bits.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

TINY, OPT = "tiny-random", "opt-random"


def load_model(source: str, weights: str | None = None) -> Any:
    """An `LM` in float32, its weights in `weights` ("int8", "int4") if given."""
    if source not in (TINY, OPT):
        from jaxinfer.loading import load

        return load(source, dtype="float32", weights=weights)
    import jax

    from jaxinfer.lm import LM
    from jaxinfer.models.params import init_params

    config = _tiny() if source == TINY else _opt()
    params = init_params(config, jax.random.key(0))
    if weights is not None:
        from jaxinfer.models.quantize import quantize_params

        params = quantize_params(config, params, weights)
    return LM(config, params, name=source)


def _tiny() -> Any:
    from jaxinfer.config import ModelConfig, RopeConfig

    return ModelConfig(
        family="llama", vocab_size=1000, hidden_size=64, intermediate_size=128, num_layers=2,
        num_heads=4, num_kv_heads=2, head_dim=16, max_positions=8192,
        rope=RopeConfig(rotary_dim=16), tie_embeddings=True, eos_token_ids=(2,),
    )  # fmt: skip


def _opt() -> Any:
    """The shape of OPT with tiny-llama's vocabulary, so that the head does not hide the blocks."""
    from jaxinfer.config import ModelConfig

    return ModelConfig(
        family="opt", vocab_size=8192, hidden_size=1024, intermediate_size=4096, num_layers=8,
        num_heads=16, num_kv_heads=16, head_dim=64, max_positions=2048, norm="layer",
        norm_bias=True, activation="relu", gated_mlp=False, positions="learned", rope=None,
        position_offset=2, qkv_bias=True, out_bias=True, mlp_bias=True, tie_embeddings=True,
        eos_token_ids=(2,),
    )  # fmt: skip


def prompts(seed: int, batch: int, length: int, vocab: int) -> list[list[int]]:
    """Random token ids: every peer reads the same ones and no tokenizer takes part."""
    rng = np.random.default_rng(seed)
    return rng.integers(3, vocab, (batch, length)).tolist()


def export_llama(lm: Any, folder: str | Path) -> None:
    """Writes `lm` as a Hugging Face Llama folder: the very same numbers, under other names."""
    from safetensors.numpy import save_file

    from jaxinfer.models.llama import decoder_sources

    folder = Path(folder)
    config = llama_config(lm.config)
    tensors = {}
    for path, source in decoder_sources(lm.config).items():
        leaf = lm.params
        for key in path:
            leaf = leaf[key]
        name = source.name if path[0] == "head" else f"model.{source.name}"
        tensors[name] = np.asarray(leaf, np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def llama_config(cfg: Any) -> dict[str, Any]:
    """The config.json of a plain Llama; ValueError for what that form cannot express."""
    plain = cfg.rope is not None and cfg.rope.scaling == "none"
    if cfg.family != "llama" or not plain or cfg.rope.rotary_dim != cfg.head_dim:
        raise ValueError(
            f"the torch peer runs plain Llama models, got family {cfg.family!r}; "
            "choose such a model, or leave the peer out with --no-torch"
        )
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "max_position_embeddings": cfg.max_positions,
        "rms_norm_eps": cfg.norm_eps,
        "hidden_act": cfg.activation,
        "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope.theta},
        "attention_bias": cfg.qkv_bias,
        "mlp_bias": cfg.mlp_bias,
        "tie_word_embeddings": cfg.tie_embeddings,
        "dtype": "float32",
    }
