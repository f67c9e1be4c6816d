"""GPT-2: learned positions, tanh GELU, layer norms, biases, weights stored [in, out] (Conv1D).

Attention scaled by the layer index (Megatron's reordered variant) is not implemented.
"""

from jaxinfer.config import ModelConfig
from jaxinfer.models.family import Family, Path, Sources, from_table, fused_columns, transpose
from jaxinfer.models.hf_config import Fields

MODULES: dict[Path, str] = {
    ("embed", "tokens"): "wte",
    ("embed", "positions"): "wpe",
    ("attn", "out"): "attn.c_proj",
    ("mlp", "up"): "mlp.c_fc",
    ("mlp", "down"): "mlp.c_proj",
    ("attn_norm",): "ln_1",
    ("mlp_norm",): "ln_2",
    ("final_norm",): "ln_f",
    ("head",): "lm_head",
}


def config_from_hf(hf: dict) -> ModelConfig:
    fields = Fields("gpt2", hf)
    vocab_size, hidden_size = fields.size("vocab_size"), fields.size("n_embd", "hidden_size")
    num_heads = fields.size("n_head", "num_attention_heads", kind="heads")
    for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        fields.require(not fields.flag(name, default=False), f"{name!r} is not implemented")
    return ModelConfig(
        family="gpt2",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.size("n_inner", default=4 * hidden_size),
        num_layers=fields.size("n_layer", "num_hidden_layers", kind="layers"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=fields.head_dim(hidden_size, num_heads),
        max_positions=fields.size("n_positions", "max_position_embeddings", default=1024),
        norm="layer",
        norm_eps=fields.positive("layer_norm_epsilon", default=1e-5),
        norm_bias=True,
        activation=fields.activation("activation_function", default="gelu_new"),
        gated_mlp=False,
        positions="learned",
        attention_scale=None if fields.flag("scale_attn_weights", default=True) else 1.0,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tie_embeddings=fields.flag("tie_word_embeddings", default=True),
        **fields.special_tokens(vocab_size, 50256, 50256),
    )


def sources(cfg: ModelConfig) -> Sources:
    result = from_table(cfg, "h.{}", MODULES, weight=transpose)
    for i in range(cfg.num_layers):
        result |= fused_columns(("layers", i, "attn"), f"h.{i}.attn.c_attn", cfg)
    return result


FAMILY = Family(
    name="gpt2",
    model_types=("gpt2",),
    config_from_hf=config_from_hf,
    sources=sources,
    prefixes=("transformer.", ""),
    ignored=(r"attn\.(masked_)?bias$",),
)
