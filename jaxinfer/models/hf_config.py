"""Strict reading of Hugging Face config.json dictionaries: one-line ValueErrors and nothing else.

`Fields` wraps the parsed file: every getter checks type and range and names the key. Limits on
sizes keep a corrupt file from asking for absurd amounts of memory before shapes are compared.
`rope_from_hf` reads both `rope_parameters` (transformers 5) and `rope_scaling` with `rope_theta`.
Not read here: generation settings and tokenizer files.
"""

import math
import reprlib
from typing import Any, NoReturn

from jaxinfer.config import Activation, RopeConfig

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
    "linear": "identity",
}
LARGEST = {"layers": 1024, "heads": 65536, "size": 2**31 - 1}
_MISSING = object()


class Fields:
    """A config.json (or a dictionary inside it) of a named family, with checked getters."""

    def __init__(self, family: str, data: Any, where: str = ""):
        if not isinstance(data, dict):
            raise ValueError(
                f"{family} config{where}: expected a dictionary, got {reprlib.repr(data)}"
            )
        self.family, self.data, self.where = family, data, where
        if not where:
            self._refuse_other_architectures()

    def refuse(self, message: str) -> NoReturn:
        raise ValueError(f"{self.family} config{self.where}: {message}")

    def require(self, condition: bool, message: str) -> None:
        if not condition:
            self.refuse(message)

    def raw(self, *names: str, default: Any = _MISSING) -> Any:
        """The first of `names` that is present and not null; else the default."""
        for name in names:
            if self.data.get(name) is not None:
                return self.data[name]
        if default is _MISSING:
            present = [name for name in names if name in self.data]
            self.refuse(f"{names[0]!r} is {'null' if present else 'missing'}; this family needs it")
        return default

    def size(self, *names: str, default: Any = _MISSING, kind: str = "size") -> Any:
        """A positive integer, or the default (returned unchecked)."""
        value = self.raw(*names, default=default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= LARGEST[kind]:
            self.refuse(
                f"{names[0]!r} must be an integer from 1 to {LARGEST[kind]}, "
                f"got {reprlib.repr(value)}"
            )
        return value

    def number(self, *names: str, default: Any = _MISSING) -> Any:
        """A finite float32 number, or the default (returned unchecked)."""
        value = self.raw(*names, default=default)
        if value is default:
            return value
        valid = isinstance(value, int | float) and not isinstance(value, bool)
        if not valid or not abs(value) < 1e38:
            self.refuse(f"{names[0]!r} must be a finite number, got {reprlib.repr(value)}")
        return float(value)

    def positive(self, *names: str, default: Any = _MISSING) -> Any:
        """A number above 1e-30, or the default."""
        value = self.number(*names, default=default)
        if value is not default and not value > 1e-30:
            self.refuse(f"{names[0]!r} must be positive, got {value}")
        return value

    def flag(self, *names: str, default: bool) -> bool:
        value = self.raw(*names, default=default)
        if not isinstance(value, bool):
            self.refuse(f"{names[0]!r} must be true or false, got {reprlib.repr(value)}")
        return value

    def activation(self, *names: str, default: str) -> Activation:
        value = self.raw(*names, default=default)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            self.refuse(
                f"{names[0]!r} is {reprlib.repr(value)}; implemented are {sorted(ACTIVATIONS)}"
            )
        return ACTIVATIONS[value]

    def nested(self, name: str) -> "Fields":
        """The dictionary under `name`, empty where it is absent."""
        return Fields(self.family, self.raw(name, default={}), f"{self.where} {name!r}")

    def head_dim(self, hidden_size: int, num_heads: int) -> int:
        """`hidden_size / num_heads`, which must be whole."""
        self.require(
            hidden_size % num_heads == 0,
            f"hidden size {hidden_size} is not a multiple of {num_heads} attention heads",
        )
        return hidden_size // num_heads

    def special_tokens(self, vocab_size: int, bos: int | None, eos: int | None) -> dict[str, Any]:
        """`bos_token_id` and `eos_token_ids`; the family's defaults apply where a key is absent."""
        start = self.data.get("bos_token_id", bos)
        stop = self.data.get("eos_token_id", eos)
        stops = [] if stop is None else stop if isinstance(stop, list) else [stop]
        for token in [*stops, *([] if start is None else [start])]:
            if isinstance(token, bool) or not isinstance(token, int):
                self.refuse(
                    f"token ids must be integers, got bos_token_id {reprlib.repr(start)} "
                    f"and eos_token_id {reprlib.repr(stop)}"
                )
        # Ids outside the vocabulary (-1 in some files, defaults of a bigger one) can never occur.
        known = [token for token in stops if 0 <= token < vocab_size]
        start = start if start is not None and 0 <= start < vocab_size else None
        return {"bos_token_id": start, "eos_token_ids": tuple(dict.fromkeys(known))}

    def windows(self, num_layers: int, window: int | None, first: int) -> tuple | None:
        """Per-layer sliding windows from `layer_types`, or `window` from layer `first` on."""
        kinds = self.raw("layer_types", default=None)
        if kinds is None:
            sliding = [window is not None and i >= first for i in range(num_layers)]
        else:
            known = ("full_attention", "sliding_attention")
            if not isinstance(kinds, list) or any(kind not in known for kind in kinds):
                self.refuse(f"'layer_types' must list {known}, got {reprlib.repr(kinds)}")
            self.require(
                len(kinds) == num_layers,
                f"'layer_types' has {len(kinds)} entries for {num_layers} layers",
            )
            sliding = [kind == "sliding_attention" for kind in kinds]
        if not any(sliding):
            return None
        self.require(window is not None, "'layer_types' asks for a window, 'sliding_window' is off")
        return tuple(window if slides else None for slides in sliding)

    def _refuse_other_architectures(self) -> None:
        if self.data.get("quantization_config") is not None:
            self.refuse(
                "'quantization_config' is set; give an unquantized checkpoint or a GGUF file"
            )
        for name in ("num_experts", "num_local_experts", "n_routed_experts"):
            if self.data.get(name):
                self.refuse(f"{name!r} is set; mixture-of-experts layers are not implemented")


def rope_from_hf(
    fields: Fields, head_dim: int, max_positions: int, *, partial: float | None = None
) -> RopeConfig:
    """The rotary embedding; `partial` is the default share of a family that rotates a part."""
    name = "rope_scaling" if fields.data.get("rope_scaling") else "rope_parameters"
    rope = fields.nested(name)
    rope.require(
        not any(isinstance(value, dict) for value in rope.data.values()),
        "one rotary embedding per layer type is not implemented",
    )
    kind = rope.raw("rope_type", "type", default="default")
    scaling = "none" if kind == "default" else kind
    if not isinstance(kind, str) or scaling not in ("none", "linear", "llama3", "yarn"):
        rope.refuse(
            f"rope type {reprlib.repr(kind)} is not implemented; known are default, linear, "
            "llama3, yarn"
        )
    theta = rope.positive("rope_theta", default=None) or fields.positive(
        "rope_theta", "rotary_emb_base", default=10000.0
    )
    share = rope.number("partial_rotary_factor", default=None)
    if share is None:
        share = fields.number("partial_rotary_factor", "rotary_pct", default=partial or 1.0)
    if partial is None:
        fields.require(share == 1, f"partial rotation ({share}) is not defined for this family")
    fields.require(0 < share <= 1, f"the rotated share must lie in (0, 1], got {share}")
    options: dict[str, Any] = {"theta": theta, "rotary_dim": int(head_dim * share)}
    if scaling == "none":
        return RopeConfig(**options)
    options["scaling"] = scaling
    if scaling == "linear":
        return RopeConfig(**options, factor=rope.positive("factor"))
    original = fields.size("original_max_position_embeddings", default=None) or rope.size(
        "original_max_position_embeddings", default=max_positions
    )
    options["original_max_positions"] = original
    if scaling == "llama3":
        low, high = rope.positive("low_freq_factor"), rope.positive("high_freq_factor")
        rope.require(high > low, f"'high_freq_factor' {high} must exceed 'low_freq_factor' {low}")
        factor = rope.positive("factor")
        return RopeConfig(**options, factor=factor, low_freq_factor=low, high_freq_factor=high)
    rope.require(theta > 1, f"yarn needs 'rope_theta' > 1, got {theta}")
    factor = rope.positive("factor", default=max_positions / original)
    return RopeConfig(
        **options,
        factor=factor,
        attention_factor=_yarn_attention_factor(rope, factor),
        beta_fast=rope.positive("beta_fast", default=32.0),
        beta_slow=rope.positive("beta_slow", default=1.0),
        truncate=rope.flag("truncate", default=True),
    )


def _yarn_attention_factor(rope: Fields, factor: float) -> float:
    """YaRN's query and key multiplier, `0.1 ln(factor) + 1` unless the file says otherwise."""

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    given = rope.positive("attention_factor", default=None)
    if given is not None:
        return given
    weight, whole = rope.number("mscale", default=0), rope.number("mscale_all_dim", default=0)
    if not (weight and whole):
        return scale(1.0)
    rope.require(scale(whole) > 0, f"'mscale_all_dim' {whole} makes the attention factor infinite")
    return scale(weight) / scale(whole)
