"""Tilings of quantize_pack."""

from dataclasses import dataclass

from pallas_kernels.tuned import around


@dataclass(frozen=True, kw_only=True)
class Config:
    """`tokens` of a program, for values; keys take one group of tokens."""

    tokens: int = 16
    warps: int = 4
    stages: int = 1


def candidates() -> list[Config]:
    """Tilings worth timing for any sizes, the default first."""
    return around(Config(), {"tokens": (4, 16, 64), "warps": (1, 2, 4, 8)})
