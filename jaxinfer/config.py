"""`ModelConfig`: everything that tells one decoder-only transformer from another.

A config is frozen, hashable and holds no arrays, so it is an ordinary static argument of `jax.jit`.
`jaxinfer.models.registry` maps Hugging Face and GGUF configurations to it, one file per family.
"""

import dataclasses
import functools
import reprlib
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from jaxinfer.typing import Json

Norm = Literal["rms", "layer"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
Positions = Literal["rope", "learned", "alibi", "none"]
MlpKind = Literal["gated", "plain"]
RopeScaling = Literal["none", "linear", "llama3", "yarn"]


LARGEST = 2**31 - 1
"""Of all integers; layers and heads have limits of their own, as loops run over them."""

MOST_ENDS = 256
"""Of `eos_token_ids`, each of which every step compares."""

_LIMITS = dict.fromkeys(
    ("vocab_size", "hidden_size", "intermediate_size", "head_dim", "max_positions"), LARGEST
) | {"num_layers": 1024, "num_heads": 65536, "num_kv_heads": 65536}


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary embedding (arXiv 2104.09864) of the first `rotary_dim` channels, half-split order.

    `scaling` names the context extension: "linear" divides positions by `factor`; "llama3" slows
    only low frequencies; "yarn" (arXiv 2309.00071) blends both by wave length and multiplies
    queries and keys by `attention_factor`.
    """

    theta: float = 10000.0
    rotary_dim: int
    scaling: RopeScaling = "none"
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True

    def __post_init__(self):
        check_types(self)
        _require(
            self.rotary_dim > 0 and self.rotary_dim % 2 == 0,
            f"rotary_dim must be even and positive, got {self.rotary_dim}",
        )
        for name in ("theta", "factor", "attention_factor", "beta_fast", "beta_slow"):
            value = getattr(self, name)
            _require(value > 1e-30, f"rope {name} must be positive, got {value}")
        if self.scaling in ("llama3", "yarn"):
            _require(
                self.original_max_positions > 0,
                f"{self.scaling} rope scaling needs original_max_position_embeddings > 0, "
                f"got {self.original_max_positions}",
            )
        _require(
            self.scaling != "llama3" or self.high_freq_factor > self.low_freq_factor,
            f"llama3 rope scaling needs high_freq_factor > low_freq_factor, got "
            f"{self.high_freq_factor} and {self.low_freq_factor}",
        )
        _require(
            self.scaling != "yarn" or self.theta > 1,
            f"yarn rope scaling needs theta > 1, got {self.theta}",
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of a decoder-only transformer.

    Block: sequential `x += attn(norm(x)); x += mlp(norm(x))`, or with `parallel_block`
    `x += attn(norm(x)) + mlp(norm'(x))`, where `shared_norm` makes the two norms one.
    `sliding_windows[i]` is layer i's window w (a query at p sees keys in (p - w, p]), None = all.
    With `sink_logits` every head has a logit that joins the softmax without a value; at 0 it is
    SoftMax-off-by-one (arXiv 2309.17453, section 3.3).

    Layers may differ: `mixers[i]` names layer i's token mixer (`jaxinfer.models.mixers`; None is
    attention everywhere) and `mlps[i]` its feed-forward block (None: as `gated_mlp` says).
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm: Norm = "rms"
    norm_eps: float = 1e-5
    norm_bias: bool = False
    activation: Activation = "silu"
    gated_mlp: bool = True
    positions: Positions = "rope"
    rope: RopeConfig | None = None
    position_offset: int = 0  # added to learned positions (OPT keeps two rows for padding)
    alibi_slopes: tuple[float, ...] | None = None
    parallel_block: bool = False
    shared_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    qk_norm: bool = False  # RMS norm of each query and key head before rotation (Qwen3)
    tie_embeddings: bool = False
    sliding_windows: tuple[int | None, ...] | None = None
    attention_scale: float | None = None  # None: head_dim ** -0.5
    attention_softcap: float | None = None
    sink_logits: bool = False
    qkv_clip: float | None = None
    mixers: tuple[str, ...] | None = None
    mlps: tuple[MlpKind, ...] | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        check_types(self)
        for name, largest in _LIMITS.items():
            value = getattr(self, name)
            _require(
                0 < value <= largest,
                f"{name} must be a positive integer up to {largest}, got {value}",
            )
        for name in ("norm_eps", "attention_scale", "attention_softcap", "qkv_clip"):
            value = getattr(self, name)
            _require(
                value is None or value > 1e-30, f"{name} must be a positive number, got {value}"
            )
        self._check_special_tokens()
        _require(
            self.position_offset >= 0,
            f"position_offset must not be negative, got {self.position_offset}",
        )
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}",
        )
        _require(
            (self.positions == "rope") == (self.rope is not None),
            f"positions={self.positions!r} and rope={self.rope!r} disagree: "
            "give rope exactly for 'rope'",
        )
        if self.rope is not None:
            _require(
                self.rope.rotary_dim <= self.head_dim,
                f"rotary_dim {self.rope.rotary_dim} exceeds head_dim {self.head_dim}",
            )
        slopes = self.num_heads if self.positions == "alibi" else None
        _require(
            slopes == (None if self.alibi_slopes is None else len(self.alibi_slopes)),
            f"positions={self.positions!r} and alibi_slopes={reprlib.repr(self.alibi_slopes)} "
            f"disagree: give one slope per head ({self.num_heads}) exactly for 'alibi'",
        )
        for name in ("sliding_windows", "mixers", "mlps"):
            value = getattr(self, name)
            _require(
                value is None or len(value) == self.num_layers,
                f"{name} has {len(value or ())} entries for {self.num_layers} layers",
            )
        if self.sliding_windows is not None:
            _require(
                all(w is None or w > 0 for w in self.sliding_windows),
                "sliding windows must be positive or None, got "
                + reprlib.repr(self.sliding_windows),
            )
        _require(
            not self.shared_norm or self.parallel_block,
            "shared_norm is only for parallel_block=True",
        )

    def _check_special_tokens(self) -> None:
        _require(
            len(self.eos_token_ids) <= MOST_ENDS,
            f"at most {MOST_ENDS} eos_token_ids, got {len(self.eos_token_ids)}",
        )
        for token in (self.bos_token_id, *self.eos_token_ids):
            _require(
                token is None or 0 <= token < self.vocab_size,
                f"bos_token_id and eos_token_ids must lie in the vocabulary of {self.vocab_size}, "
                f"got {token}",
            )

    @property
    def group_size(self) -> int:
        """Query heads per key/value head."""
        return self.num_heads // self.num_kv_heads

    def window(self, layer: int) -> int | None:
        return None if self.sliding_windows is None else self.sliding_windows[layer]

    def mixer(self, layer: int) -> str:
        """The name of a layer's token mixer."""
        return "attn" if self.mixers is None else self.mixers[layer]

    def mlp(self, layer: int) -> MlpKind:
        """The kind of a layer's feed-forward block."""
        if self.mlps is not None:
            return self.mlps[layer]
        return "gated" if self.gated_mlp else "plain"

    def to_dict(self) -> Json:
        """A JSON-ready dictionary; `ModelConfig.from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Json) -> "ModelConfig":
        data = known_fields(cls, data)
        if data.get("rope") is not None:
            data["rope"] = RopeConfig(**known_fields(RopeConfig, data["rope"]))
        return cls(**data)


def known_fields(cls: type, data: Any) -> dict[str, Any]:
    """Keyword arguments for a dataclass, every list a tuple; none unknown, none missing."""
    _require(
        isinstance(data, dict),
        f"{cls.__name__} must be an object of fields, got {reprlib.repr(data)}",
    )
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(data) - set(fields))
    _require(not unknown, f"unknown config fields {unknown}; known are {sorted(fields)}")
    missing = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and name not in data
    ]
    _require(not missing, f"config fields {missing} are missing")
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in data.items()
    }


def check_types(config: Any) -> None:
    """Raise unless every field of a dataclass holds a value of its annotated type."""
    for name, kind in _hints(type(config)).items():
        value = getattr(config, name)
        _require(_is_a(value, kind), f"{name} must be {_expected(kind)}, got {reprlib.repr(value)}")


_hints = functools.cache(get_type_hints)
_EXPECTED = {
    bool: "true or false",
    float: "a finite number",
    int: "a 32-bit integer",
    str: "a text",
    dict: "an object",
    NoneType: "null",
}


def _is_a(value: Any, kind: Any) -> bool:
    """`isinstance` that knows Literal, unions and tuples; an integer will do for a float."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return isinstance(value, str) and value in parts
    if origin is UnionType:
        return any(_is_a(value, part) for part in parts)
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_a(item, parts[0]) for item in value)
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, int):
        return kind in (int, float) and abs(value) <= LARGEST
    if isinstance(value, float):
        return kind is float and abs(value) < 1e38
    return isinstance(value, kind)


def _expected(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, parts))
    if origin is UnionType:
        return " or ".join(map(_expected, parts))
    if origin is tuple:
        return f"a list of ({_expected(parts[0])})"
    return _EXPECTED.get(kind, f"a {kind.__name__}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
