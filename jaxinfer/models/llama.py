"""Llama (arXiv 2302.13971) and the many models that share its form: Vicuna, SmolLM2, TinyLlama, Yi.

RMS norm, rotary positions, gated SiLU, grouped-query attention, no biases unless the file says so.
`decoder_config` and `decoder_sources` serve Mistral, Qwen2 and Qwen3 too, which differ in biases,
sliding windows and norms of queries and keys.
"""

from typing import Any

from jaxinfer.config import ModelConfig
from jaxinfer.models.family import Family, Path, Sources, from_table
from jaxinfer.models.hf_config import Fields, rope_from_hf

MODULES: dict[Path, str] = {
    ("embed", "tokens"): "embed_tokens",
    ("attn", "q"): "self_attn.q_proj",
    ("attn", "k"): "self_attn.k_proj",
    ("attn", "v"): "self_attn.v_proj",
    ("attn", "out"): "self_attn.o_proj",
    ("mlp", "gate"): "mlp.gate_proj",
    ("mlp", "up"): "mlp.up_proj",
    ("mlp", "down"): "mlp.down_proj",
    ("attn_norm",): "input_layernorm",
    ("mlp_norm",): "post_attention_layernorm",
    ("final_norm",): "norm",
    ("head",): "lm_head",
}
QK_NORM: dict[Path, str] = {
    ("attn", "q_norm"): "self_attn.q_norm",
    ("attn", "k_norm"): "self_attn.k_norm",
}


def decoder_config(
    fields: Fields,
    *,
    max_positions: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    bos: int | None = None,
    eos: int | None = None,
    **options: Any,
) -> ModelConfig:
    """The Llama form with a family's defaults; `options` are further `ModelConfig` fields."""
    vocab_size, hidden_size = fields.size("vocab_size"), fields.size("hidden_size")
    num_heads = fields.size("num_attention_heads", kind="heads")
    head_dim = fields.size("head_dim", default=head_dim)
    head_dim = head_dim or fields.head_dim(hidden_size, num_heads)
    max_positions = fields.size("max_position_embeddings", default=max_positions)
    kv_default = num_heads if kv_heads is None or "num_key_value_heads" in fields.data else kv_heads
    return ModelConfig(
        family=fields.family,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.size("intermediate_size"),
        num_layers=fields.size("num_hidden_layers", kind="layers"),
        num_heads=num_heads,
        num_kv_heads=fields.size("num_key_value_heads", default=kv_default, kind="heads"),
        head_dim=head_dim,
        max_positions=max_positions,
        norm_eps=fields.positive("rms_norm_eps", default=1e-6),
        activation=fields.activation("hidden_act", default="silu"),
        rope=rope_from_hf(fields, head_dim, max_positions),
        tie_embeddings=fields.flag("tie_word_embeddings", default=False),
        **fields.special_tokens(vocab_size, bos, eos),
        **options,
    )


def decoder_sources(cfg: ModelConfig) -> Sources:
    """Sources of the Llama form, by the config's biases and norms."""
    return from_table(cfg, "layers.{}", MODULES | QK_NORM if cfg.qk_norm else MODULES)


def config_from_hf(hf: dict) -> ModelConfig:
    fields = Fields("llama", hf)
    bias = fields.flag("attention_bias", default=False)
    return decoder_config(
        fields,
        max_positions=2048,
        bos=1,
        eos=2,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=fields.flag("mlp_bias", default=False),
    )


FAMILY = Family(
    name="llama",
    model_types=("llama",),
    config_from_hf=config_from_hf,
    sources=decoder_sources,
    prefixes=("model.", ""),
    ignored=(r"rotary_emb\.inv_freq$",),
)
