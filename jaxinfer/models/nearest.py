"""The supported family that is nearest to an unknown one, for the line that refuses it.

A name that is nearly a known one decides ("qwen3_moe", "lama"), then the settings that only one
form of transformer has. It is a hint of where to start a new family, not a promise that weights
load.
"""

import difflib
from collections.abc import Collection, Iterable

ALIKE = 0.75
"""Of `difflib`'s ratio; "mamba" and "llama" have 0.6."""

RELATIVES = {
    "baichuan": "llama",
    "bloom": "mpt",
    "codegen": "gpt_neox",
    "cohere": "llama",
    "deepseek": "llama",
    "exaone": "llama",
    "gemma": "llama",
    "glm": "llama",
    "gpt_bigcode": "gpt2",
    "gpt_neo": "gpt2",
    "gpt_oss": "llama",
    "gptj": "gpt_neox",
    "granite": "llama",
    "internlm": "llama",
    "ministral": "mistral",
    "mixtral": "mistral",
    "olmo": "llama",
    "phi": "llama",
    "refinedweb": "falcon",
    "smollm": "llama",
    "stablelm": "gpt_neox",
    "starcoder2": "mistral",
}
SETTINGS = (
    ("n_embd", "gpt2"),
    ("attn_config", "mpt"),
    ("new_decoder_architecture", "falcon"),
    ("rotary_pct", "gpt_neox"),
    ("ffn_dim", "opt"),
    ("rms_norm_eps", "llama"),
    ("num_key_value_heads", "llama"),
    ("layer_norm_eps", "gpt_neox"),
)


def nearest(name: str, known: Collection[str], settings: Iterable[str] = ()) -> str:
    """One of `known` (or of the families beside it): by `name`, else by names of `settings`."""
    name = name[:64].lower()
    named = {family: family for family in known} | RELATIVES
    start = max((k for k in named if name.startswith(k)), key=len, default=None)
    if start is not None:
        return named[start]
    alike = difflib.get_close_matches(name, known, 1, ALIKE)
    if alike:
        return alike[0]
    present = set(settings)
    return next((family for key, family in SETTINGS if key in present), "llama")
