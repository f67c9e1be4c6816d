"""Tilings of put_tokens: a program owns some tokens of a row and head, in every array."""

from dataclasses import dataclass

from pallas_kernels.shapes import power_of_two
from pallas_kernels.tuned import around, near

MOST = 16  # tokens of a program: a prompt's chunk has thousands of tokens
NUMBERS = 512  # of an array for each warp


@dataclass(frozen=True, kw_only=True)
class Config:
    """`tokens` of a program and the `warps` that share them, both powers of two."""

    tokens: int
    warps: int

    def __post_init__(self):
        if any(n < 1 or n & (n - 1) for n in (self.tokens, self.warps)):
            raise ValueError(
                f"tokens and warps must be powers of two, got {self.tokens} and {self.warps}"
            )


def heuristic(tokens: int, width: int) -> Config:
    """For `tokens` of a row with heads of `width`."""
    part = min(power_of_two(tokens), MOST)
    return Config(tokens=part, warps=min(max(part * power_of_two(width) // NUMBERS, 1), 4))


def candidates(tokens: int, width: int) -> list[Config]:
    """Tilings worth timing for such sizes, the heuristic's first."""
    first = heuristic(tokens, width)
    parts = near(first.tokens, most=power_of_two(tokens))
    return around(first, {"tokens": parts, "warps": (1, 2, 4)})
