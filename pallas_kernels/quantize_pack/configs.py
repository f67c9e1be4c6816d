"""Tilings of quantize_pack."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Config:
    """`tokens` of a program, for values; keys take one group of tokens."""

    tokens: int = 16
    warps: int = 4
    stages: int = 1
