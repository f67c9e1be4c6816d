"""Tilings of kivi_push."""

from dataclasses import dataclass, replace

NUMBERS_PER_WARP = 1024  # 32 of a thread


@dataclass(frozen=True, kw_only=True)
class Config:
    """`warps` of a program; they quantize `numbers` at a time, which bounds the registers."""

    warps: int = 4
    stages: int = 1

    @property
    def numbers(self) -> int:
        return NUMBERS_PER_WARP * self.warps


def candidates() -> list[Config]:
    """Tilings worth timing for any sizes, the default first."""
    return [Config(), *(replace(Config(), warps=warps) for warps in (1, 2, 8))]
