"""Which method learned an artefact, for which model, and what all its layers share."""

from dataclasses import dataclass, field
from typing import Any, Literal

from jaxinfer.config import ModelConfig
from jaxinfer.fields import LARGEST, check_types
from jaxinfer.sparsity.base import check_lookahead
from jaxinfer.typing import Json

MethodName = Literal["deja_vu", "lte"]
SIZES = (
    *("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads"),
    "vocab_size",
)
MOST_LAYERS = 1024


@dataclass(frozen=True, kw_only=True)
class SparsityConfig:
    """The method, the identity of its model, and what all layers share.

    `lookahead` is that of the routers of neurons, in layers (None: they read the token's
    embedding); the router of an early layer may look less far ahead.
    """

    method: MethodName
    model: str
    fingerprint: str  # of the model's weights
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    gated: bool
    block_size: int  # neurons
    lookahead: float | None = 0.0
    recipe: dict = field(default_factory=dict)
    results: dict = field(default_factory=dict)

    def __post_init__(self):
        check_types(self)
        for name in (*SIZES, "block_size"):
            most = MOST_LAYERS if name == "num_layers" else LARGEST
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must be from 1 to {most}, got {getattr(self, name)}")
        if self.intermediate_size % self.block_size:
            raise ValueError(
                f"blocks of {self.block_size} neurons do not divide {self.intermediate_size}"
            )
        if self.lookahead is not None:
            check_lookahead(self.lookahead)

    @classmethod
    def of(
        cls,
        cfg: ModelConfig,
        fingerprint: str,
        *,
        method: MethodName,
        model: str,
        block_size: int,
        lookahead: float | None = 0.0,
        recipe: Json | None = None,
        results: Json | None = None,
    ) -> "SparsityConfig":
        """The config for a model, of which `fingerprint` tells the weights
        (`jaxinfer.models.fingerprint`)."""
        return cls(
            **sizes(cfg), fingerprint=fingerprint, method=method, model=model,
            block_size=block_size, lookahead=lookahead, recipe=recipe or {}, results=results or {},
        )  # fmt: skip

    @property
    def blocks(self) -> int:
        """J."""
        return self.intermediate_size // self.block_size

    def matrices(self) -> dict[str, tuple[int, int]]:
        """The shapes [outputs, inputs] of a block's matrices."""
        f, d = self.intermediate_size, self.hidden_size
        return {"up": (f, d), "down": (d, f)} | ({"gate": (f, d)} if self.gated else {})


def sizes(cfg: ModelConfig) -> dict[str, Any]:
    """What identifies the architecture."""
    kinds = {cfg.mlp(layer) for layer in range(cfg.num_layers)}
    if len(kinds) > 1:
        raise ValueError("blocks of two kinds in one model cannot share a sparsity artefact")
    return {name: getattr(cfg, name) for name in SIZES} | {"gated": kinds == {"gated"}}
