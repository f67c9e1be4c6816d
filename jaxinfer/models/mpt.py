"""MPT: ALiBi positions, layer norms and linear layers without biases, GELU.

`attn_config` holds the attention's options; those the reference ignores (learned positions instead
of ALiBi, biases, logit scaling, multi-query or prefix attention) are refused, not misread.
"""

from jaxinfer.config import ModelConfig
from jaxinfer.models.family import Family, Path, Sources, from_table, fused_rows
from jaxinfer.models.hf_config import Fields
from jaxinfer.nn.alibi import mpt_slopes

MODULES: dict[Path, str] = {
    ("embed", "tokens"): "wte",
    ("attn", "out"): "attn.out_proj",
    ("mlp", "up"): "ffn.up_proj",
    ("mlp", "down"): "ffn.down_proj",
    ("attn_norm",): "norm_1",
    ("mlp_norm",): "norm_2",
    ("final_norm",): "norm_f",
    ("head",): "lm_head",
}


def config_from_hf(hf: dict) -> ModelConfig:
    fields = Fields("mpt", hf)
    attention = fields.nested("attn_config")
    _refuse_variants(fields, attention)
    vocab_size, hidden_size = fields.size("vocab_size"), fields.size("d_model", "hidden_size")
    num_heads = fields.size("n_heads", "num_attention_heads", kind="heads")
    bias_max = attention.positive("alibi_bias_max", default=8)
    clip = attention.number("clip_qkv", default=None)
    attention.require(not clip or clip > 0, f"'clip_qkv' must not be negative, got {clip}")
    return ModelConfig(
        family="mpt",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * fields.size("expansion_ratio", default=4),
        num_layers=fields.size("n_layers", "num_hidden_layers", kind="layers"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=fields.head_dim(hidden_size, num_heads),
        max_positions=fields.size("max_seq_len", default=2048),
        norm="layer",
        norm_eps=fields.positive("layer_norm_epsilon", default=1e-5),
        activation="gelu",
        gated_mlp=False,
        positions="alibi",
        alibi_slopes=mpt_slopes(num_heads, bias_max),
        attention_scale=attention.positive("softmax_scale", default=None),
        qkv_clip=clip or None,
        tie_embeddings=fields.flag("tie_word_embeddings", default=True),
        **fields.special_tokens(vocab_size, None, None),
    )


def _refuse_variants(fields: Fields, attention: Fields) -> None:
    kind = attention.raw("attn_type", default="multihead_attention")
    attention.require(kind == "multihead_attention", "only multihead attention is implemented")
    attention.require(attention.flag("alibi", default=True), "only ALiBi positions are implemented")
    for name in ("qk_ln", "prefix_lm"):
        attention.require(not attention.flag(name, default=False), f"{name!r} is not implemented")
    fields.require(fields.flag("no_bias", default=True), "'no_bias' false is not implemented")
    fields.require(fields.data.get("logit_scale") is None, "'logit_scale' is not implemented")
    kinds = ("low_precision_layernorm", "layernorm")
    fields.require(
        fields.raw("norm_type", default=kinds[0]) in kinds,
        f"'norm_type' must be one of {kinds}",
    )


def sources(cfg: ModelConfig) -> Sources:
    result = from_table(cfg, "blocks.{}", MODULES)
    for i in range(cfg.num_layers):
        result |= fused_rows(("layers", i, "attn"), f"blocks.{i}.attn.Wqkv", cfg, groups=1)
    return result


FAMILY = Family(
    name="mpt",
    model_types=("mpt",),
    config_from_hf=config_from_hf,
    sources=sources,
    prefixes=("transformer.", ""),
)
