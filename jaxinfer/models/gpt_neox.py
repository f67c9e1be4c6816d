"""GPT-NeoX (arXiv 2204.06745) and Pythia: parallel residual, partial rotation, biases.

The fused projection interleaves query, key and value per head. Checkpoints from before
transformers 5 call the output head `embed_out`.
"""

from jaxinfer.config import ModelConfig
from jaxinfer.models.family import Family, Path, Source, Sources, from_table, fused_rows
from jaxinfer.models.hf_config import Fields, rope_from_hf

MODULES: dict[Path, str] = {
    ("embed", "tokens"): "embed_in",
    ("attn", "out"): "attention.dense",
    ("mlp", "up"): "mlp.dense_h_to_4h",
    ("mlp", "down"): "mlp.dense_4h_to_h",
    ("attn_norm",): "input_layernorm",
    ("mlp_norm",): "post_attention_layernorm",
    ("final_norm",): "final_layer_norm",
}


def config_from_hf(hf: dict) -> ModelConfig:
    fields = Fields("gpt_neox", hf)
    vocab_size, hidden_size = fields.size("vocab_size"), fields.size("hidden_size")
    num_heads = fields.size("num_attention_heads", kind="heads")
    head_dim = fields.head_dim(hidden_size, num_heads)
    max_positions = fields.size("max_position_embeddings", default=2048)
    bias = fields.flag("attention_bias", default=True)
    return ModelConfig(
        family="gpt_neox",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.size("intermediate_size"),
        num_layers=fields.size("num_hidden_layers", kind="layers"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        max_positions=max_positions,
        norm="layer",
        norm_eps=fields.positive("layer_norm_eps", default=1e-5),
        norm_bias=True,
        activation=fields.activation("hidden_act", default="gelu"),
        gated_mlp=False,
        rope=rope_from_hf(fields, head_dim, max_positions, partial=0.25),
        parallel_block=fields.flag("use_parallel_residual", default=True),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=True,
        tie_embeddings=fields.flag("tie_word_embeddings", default=False),
        **fields.special_tokens(vocab_size, 0, 2),
    )


def sources(cfg: ModelConfig) -> Sources:
    result = from_table(cfg, "layers.{}", MODULES)
    for i in range(cfg.num_layers):
        fused = f"layers.{i}.attention.query_key_value"
        result |= fused_rows(("layers", i, "attn"), fused, cfg, groups=cfg.num_kv_heads)
    if not cfg.tie_embeddings:
        result["head", "weight"] = Source("lm_head.weight", aliases=("embed_out.weight",))
    return result


FAMILY = Family(
    name="gpt_neox",
    model_types=("gpt_neox",),
    config_from_hf=config_from_hf,
    sources=sources,
    prefixes=("gpt_neox.", ""),
    ignored=(r"attention\.(masked_)?bias$", r"rotary_emb\.inv_freq$"),
)
