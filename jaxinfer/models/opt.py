"""OPT (arXiv 2205.01068): learned positions with an offset of two, ReLU, layer norms, biases.

The post-norm form with projected embeddings (OPT-350m) is not implemented.
"""

from jaxinfer.config import ModelConfig
from jaxinfer.models.family import Family, Path, Sources, from_table
from jaxinfer.models.hf_config import Fields

MODULES: dict[Path, str] = {
    ("embed", "tokens"): "embed_tokens",
    ("embed", "positions"): "embed_positions",
    ("attn", "q"): "self_attn.q_proj",
    ("attn", "k"): "self_attn.k_proj",
    ("attn", "v"): "self_attn.v_proj",
    ("attn", "out"): "self_attn.out_proj",
    ("mlp", "up"): "fc1",
    ("mlp", "down"): "fc2",
    ("attn_norm",): "self_attn_layer_norm",
    ("mlp_norm",): "final_layer_norm",
    ("final_norm",): "final_layer_norm",
    ("head",): "lm_head",
}


def config_from_hf(hf: dict) -> ModelConfig:
    fields = Fields("opt", hf)
    vocab_size, hidden_size = fields.size("vocab_size"), fields.size("hidden_size")
    num_heads = fields.size("num_attention_heads", kind="heads")
    width = fields.size("word_embed_proj_dim", default=hidden_size)
    fields.require(
        fields.flag("do_layer_norm_before", default=True)
        and not fields.flag("_remove_final_layer_norm", default=False),
        "only the pre-norm form with a final norm is implemented (not OPT-350m)",
    )
    fields.require(
        width == hidden_size,
        f"'word_embed_proj_dim' {width} differs from hidden_size {hidden_size}: not implemented",
    )
    fields.require(
        fields.flag("layer_norm_elementwise_affine", default=True),
        "layer norms without parameters are not implemented",
    )
    bias = fields.flag("enable_bias", default=True)
    return ModelConfig(
        family="opt",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.size("ffn_dim"),
        num_layers=fields.size("num_hidden_layers", kind="layers"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=fields.head_dim(hidden_size, num_heads),
        max_positions=fields.size("max_position_embeddings", default=2048),
        norm="layer",
        norm_bias=True,
        activation=fields.activation("activation_function", default="relu"),
        gated_mlp=False,
        positions="learned",
        position_offset=2,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        tie_embeddings=fields.flag("tie_word_embeddings", default=True),
        **fields.special_tokens(vocab_size, 2, 2),
    )


def sources(cfg: ModelConfig) -> Sources:
    return from_table(cfg, "layers.{}", MODULES)


FAMILY = Family(
    name="opt",
    model_types=("opt",),
    config_from_hf=config_from_hf,
    sources=sources,
    prefixes=("model.decoder.", "decoder.", ""),
)
