"""Tilings of the residual sum and norm: a program owns a whole row."""

from dataclasses import dataclass

from pallas_kernels.shapes import power_of_two
from pallas_kernels.tuned import around

THREADS, MOST = 32, 16  # of a warp; warps of a program
NUMBERS = 4  # of a row for each thread, while there are warps


@dataclass(frozen=True, kw_only=True)
class Config:
    """`warps` that share a row."""

    warps: int

    def __post_init__(self):
        if self.warps < 1 or self.warps & (self.warps - 1):
            raise ValueError(f"warps must be a power of two, got {self.warps}")


def heuristic(rows: int, width: int) -> Config:
    """For `rows` of `width`: few rows want many threads each, which load at once."""
    del rows
    return Config(warps=min(max(power_of_two(width) // (NUMBERS * THREADS), 1), MOST))


def candidates(rows: int, width: int) -> list[Config]:
    """Tilings worth timing for such sizes, the heuristic's first."""
    first = heuristic(rows, width)
    return around(first, {"warps": (1, 2, 4, 8, 16)})
