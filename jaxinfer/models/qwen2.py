"""Qwen2 and Qwen2.5 (arXiv 2407.10671): the Llama form with biased queries, keys and values.

Sliding windows apply only with `use_sliding_window`, from layer `max_window_layers` on or where
`layer_types` says so.
"""

from jaxinfer.config import ModelConfig
from jaxinfer.models.family import Family
from jaxinfer.models.hf_config import Fields
from jaxinfer.models.llama import decoder_config, decoder_sources


def sliding_windows(fields: Fields) -> tuple[int | None, ...] | None:
    """Per-layer windows by Qwen's four keys."""
    window = None
    if fields.flag("use_sliding_window", default=False):
        # Absent means 4096, null means off, as in the reference.
        default = None if "sliding_window" in fields.data else 4096
        window = fields.size("sliding_window", default=default)
    first = fields.raw("max_window_layers", default=28)
    fields.require(
        isinstance(first, int) and not isinstance(first, bool) and first >= 0,
        "'max_window_layers' must be an integer of at least 0",
    )
    layers = fields.size("num_hidden_layers", kind="layers")
    return fields.windows(layers, window, first)


def config_from_hf(hf: dict) -> ModelConfig:
    fields = Fields("qwen2", hf)
    return decoder_config(
        fields,
        max_positions=32768,
        kv_heads=32,
        qkv_bias=True,
        sliding_windows=sliding_windows(fields),
    )


FAMILY = Family(
    name="qwen2",
    model_types=("qwen2",),
    config_from_hf=config_from_hf,
    sources=decoder_sources,
    prefixes=("model.", ""),
    ignored=(r"rotary_emb\.inv_freq$",),
)
