"""`ModelConfig`: everything that tells one decoder-only transformer from another.

A config is frozen, hashable and holds no arrays, so it is an ordinary static argument of `jax.jit`.
`jaxinfer.models.registry` maps Hugging Face and GGUF configurations to it, one file per family.
"""

import dataclasses
import reprlib
from dataclasses import dataclass
from typing import Literal

from jaxinfer.fields import LARGEST, check_types, known_fields, require
from jaxinfer.hyena_config import HyenaConfig
from jaxinfer.typing import Json

Norm = Literal["rms", "rms_outside", "layer"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "identity"]
Positions = Literal["rope", "learned", "alibi", "none"]
MlpKind = Literal["gated", "plain"]
RopeScaling = Literal["none", "linear", "llama3", "yarn"]


MOST_ENDS = 256
"""Of `eos_token_ids`, each of which every step compares."""

# Layers and heads have limits of their own, as loops run over them.
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
        require(
            self.rotary_dim > 0 and self.rotary_dim % 2 == 0,
            f"rotary_dim must be even and positive, got {self.rotary_dim}",
        )
        for name in ("theta", "factor", "attention_factor", "beta_fast", "beta_slow"):
            value = getattr(self, name)
            require(value > 1e-30, f"rope {name} must be positive, got {value}")
        if self.scaling in ("llama3", "yarn"):
            require(
                self.original_max_positions > 0,
                f"{self.scaling} rope scaling needs original_max_position_embeddings > 0, "
                f"got {self.original_max_positions}",
            )
        require(
            self.scaling != "llama3" or self.high_freq_factor > self.low_freq_factor,
            f"llama3 rope scaling needs high_freq_factor > low_freq_factor, got "
            f"{self.high_freq_factor} and {self.low_freq_factor}",
        )
        require(
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
    hyena: HyenaConfig | None = None  # of layers whose mixer is "hyena"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        check_types(self)
        for name, largest in _LIMITS.items():
            value = getattr(self, name)
            require(
                0 < value <= largest,
                f"{name} must be a positive integer up to {largest}, got {value}",
            )
        for name in ("norm_eps", "attention_scale", "attention_softcap", "qkv_clip"):
            value = getattr(self, name)
            require(
                value is None or value > 1e-30, f"{name} must be a positive number, got {value}"
            )
        self._check_special_tokens()
        require(
            self.position_offset >= 0,
            f"position_offset must not be negative, got {self.position_offset}",
        )
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}",
        )
        require(
            (self.positions == "rope") == (self.rope is not None),
            f"positions={self.positions!r} and rope={self.rope!r} disagree: "
            "give rope exactly for 'rope'",
        )
        if self.rope is not None:
            require(
                self.rope.rotary_dim <= self.head_dim,
                f"rotary_dim {self.rope.rotary_dim} exceeds head_dim {self.head_dim}",
            )
        slopes = self.num_heads if self.positions == "alibi" else None
        require(
            slopes == (None if self.alibi_slopes is None else len(self.alibi_slopes)),
            f"positions={self.positions!r} and alibi_slopes={reprlib.repr(self.alibi_slopes)} "
            f"disagree: give one slope per head ({self.num_heads}) exactly for 'alibi'",
        )
        for name in ("sliding_windows", "mixers", "mlps"):
            value = getattr(self, name)
            require(
                value is None or len(value) == self.num_layers,
                f"{name} has {len(value or ())} entries for {self.num_layers} layers",
            )
        self._check_hyena()
        if self.sliding_windows is not None:
            require(
                all(w is None or w > 0 for w in self.sliding_windows),
                "sliding windows must be positive or None, got "
                + reprlib.repr(self.sliding_windows),
            )
        require(
            not self.shared_norm or self.parallel_block,
            "shared_norm is only for parallel_block=True",
        )

    def _check_hyena(self) -> None:
        own = self.hyena
        require(
            (own is not None) == ("hyena" in (self.mixers or ())),
            "give hyena exactly when mixers name it, got "
            f"mixers={reprlib.repr(self.mixers)} and hyena={own!r}",
        )
        if own is None:
            return
        require(
            self.hidden_size % own.head_size == 0,
            f"hidden_size {self.hidden_size} must be a multiple of hyena head_size {own.head_size}",
        )
        for name in ("modes", "taps"):
            value = getattr(own, name)
            require(
                value is None or len(value) == self.num_layers,
                f"hyena {name} has {len(value or ())} entries for {self.num_layers} layers",
            )

    def _check_special_tokens(self) -> None:
        require(
            len(self.eos_token_ids) <= MOST_ENDS,
            f"at most {MOST_ENDS} eos_token_ids, got {len(self.eos_token_ids)}",
        )
        for token in (self.bos_token_id, *self.eos_token_ids):
            require(
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

    def first(self, layers: int) -> "ModelConfig":
        """The configuration of the first layers alone."""
        return self.part(range(layers))

    def part(self, layers: range) -> "ModelConfig":
        """The configuration of a run of layers, which count from 0 in it."""
        each = ("sliding_windows", "mixers", "mlps")  # one entry per layer, or None
        some = slice(layers.start, layers.stop)
        kept = {name: (getattr(self, name) or ())[some] or None for name in each}
        is_left = self.hyena is not None and "hyena" in (kept["mixers"] or ())
        hyena = self.hyena.part(layers) if self.hyena is not None and is_left else None
        return dataclasses.replace(self, num_layers=len(layers), hyena=hyena, **kept)

    def to_dict(self) -> Json:
        """A JSON-ready dictionary; `ModelConfig.from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Json) -> "ModelConfig":
        return cls(**known_fields(cls, data))
