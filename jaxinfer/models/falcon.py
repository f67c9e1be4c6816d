"""Falcon (arXiv 2311.16867): layer norms with bias, linear layers usually without.

Three forms: 7B (multi-query, parallel block under one norm), the new decoder architecture of 40B,
180B and Falcon2-11B (grouped queries, parallel block under two norms, or one), and RefinedWeb
(ALiBi, sequential block). One fused projection holds, per key head, its queries, key and value.
The reference's eager attention adds ALiBi twice; ours equals its default path, sdpa.
"""

from jaxinfer.config import ModelConfig
from jaxinfer.models.family import Family, Path, Sources, from_table, fused_rows
from jaxinfer.models.hf_config import Fields, rope_from_hf
from jaxinfer.nn.alibi import falcon_slopes

MODULES: dict[Path, str] = {
    ("embed", "tokens"): "word_embeddings",
    ("attn", "out"): "self_attention.dense",
    ("mlp", "up"): "mlp.dense_h_to_4h",
    ("mlp", "down"): "mlp.dense_4h_to_h",
    ("attn_norm",): "input_layernorm",
    ("mlp_norm",): "post_attention_layernorm",
    ("final_norm",): "ln_f",
    ("head",): "lm_head",
}


def config_from_hf(hf: dict) -> ModelConfig:
    fields = Fields("falcon", hf)
    vocab_size, hidden_size = fields.size("vocab_size"), fields.size("hidden_size", "n_embed")
    num_heads = fields.size("num_attention_heads", "n_head", kind="heads")
    head_dim = fields.head_dim(hidden_size, num_heads)
    max_positions = fields.size("max_position_embeddings", default=2048)
    grouped = fields.flag("new_decoder_architecture", default=False)
    parallel = grouped or fields.flag("parallel_attn", default=True)
    alibi, bias = fields.flag("alibi", default=False), fields.flag("bias", default=False)
    norms = fields.size("num_ln_in_parallel_attn", default=2 if grouped else 1)
    fields.require(
        norms == 1 or (norms == 2 and grouped),
        f"'num_ln_in_parallel_attn' {norms} is not defined for this architecture",
    )
    return ModelConfig(
        family="falcon",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.size("ffn_hidden_size", default=4 * hidden_size),
        num_layers=fields.size("num_hidden_layers", "n_layer", kind="layers"),
        num_heads=num_heads,
        num_kv_heads=_kv_heads(fields, grouped, num_heads),
        head_dim=head_dim,
        max_positions=max_positions,
        norm="layer",
        norm_eps=fields.positive("layer_norm_epsilon", default=1e-5),
        norm_bias=True,
        activation=fields.activation("activation", default="gelu"),
        gated_mlp=False,
        positions="alibi" if alibi else "rope",
        rope=None if alibi else rope_from_hf(fields, head_dim, max_positions),
        alibi_slopes=falcon_slopes(num_heads, head_dim) if alibi else None,
        parallel_block=parallel,
        shared_norm=parallel and norms == 1,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        tie_embeddings=fields.flag("tie_word_embeddings", default=True),
        **fields.special_tokens(vocab_size, 11, 11),
    )


def _kv_heads(fields: Fields, grouped: bool, num_heads: int) -> int:
    if grouped:
        return fields.size("num_kv_heads", "n_head_kv", default=num_heads, kind="heads")
    return 1 if fields.flag("multi_query", default=True) else num_heads


def sources(cfg: ModelConfig) -> Sources:
    modules = MODULES
    if cfg.parallel_block and not cfg.shared_norm:
        modules = MODULES | {("attn_norm",): "ln_attn", ("mlp_norm",): "ln_mlp"}
    result = from_table(cfg, "h.{}", modules)
    for i in range(cfg.num_layers):
        fused = f"h.{i}.self_attention.query_key_value"
        result |= fused_rows(("layers", i, "attn"), fused, cfg, groups=cfg.num_kv_heads)
    return result


FAMILY = Family(
    name="falcon",
    model_types=("falcon",),
    config_from_hf=config_from_hf,
    sources=sources,
    prefixes=("transformer.", ""),
    ignored=(r"rotary_emb\.inv_freq$",),
)
