"""Mistral (arXiv 2310.06825): the Llama form, with a sliding window in v0.1 only.

A missing `sliding_window` means 4096, null means no window, as in the reference. Ministral's
alternating layers have a model type of their own and are refused here.
"""

from jaxinfer.config import ModelConfig
from jaxinfer.models.family import Family
from jaxinfer.models.hf_config import Fields
from jaxinfer.models.llama import decoder_config, decoder_sources


def config_from_hf(hf: dict) -> ModelConfig:
    fields = Fields("mistral", hf)
    default = None if "sliding_window" in hf else 4096
    window = fields.size("sliding_window", default=default)
    layers = fields.size("num_hidden_layers", kind="layers")
    uniform = "full_attention" if window is None else "sliding_attention"
    kinds = fields.raw("layer_types", default=[uniform])
    fields.require(
        isinstance(kinds, list) and all(kind == uniform for kind in kinds),
        f"'layer_types' must all be {uniform!r}; alternating layers are not implemented",
    )
    return decoder_config(
        fields,
        max_positions=131072,
        kv_heads=8,
        bos=1,
        eos=2,
        sliding_windows=None if window is None else (window,) * layers,
    )


FAMILY = Family(
    name="mistral",
    model_types=("mistral",),
    config_from_hf=config_from_hf,
    sources=decoder_sources,
    prefixes=("model.", ""),
    ignored=(r"rotary_emb\.inv_freq$",),
)
