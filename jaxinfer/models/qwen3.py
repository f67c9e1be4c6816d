"""Qwen3, dense (arXiv 2505.09388): the Llama form with an RMS norm of every query and key head.

Heads are 128 wide unless the file says otherwise, also where that is not hidden_size / heads.
"""

from jaxinfer.config import ModelConfig
from jaxinfer.models.family import Family
from jaxinfer.models.hf_config import Fields
from jaxinfer.models.llama import decoder_config, decoder_sources
from jaxinfer.models.qwen2 import sliding_windows


def config_from_hf(hf: dict) -> ModelConfig:
    fields = Fields("qwen3", hf)
    bias = fields.flag("attention_bias", default=False)
    return decoder_config(
        fields,
        max_positions=32768,
        kv_heads=32,
        head_dim=128,
        qk_norm=True,
        qkv_bias=bias,
        out_bias=bias,
        sliding_windows=sliding_windows(fields),
    )


FAMILY = Family(
    name="qwen3",
    model_types=("qwen3",),
    config_from_hf=config_from_hf,
    sources=decoder_sources,
    prefixes=("model.", ""),
)
