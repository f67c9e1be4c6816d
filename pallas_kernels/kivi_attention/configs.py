"""Tilings of attention over packed codes."""

from dataclasses import dataclass

from pallas_kernels.common import blocks_of, power_of_two
from pallas_kernels.tuned import around, near

PROGRAMS = 528  # four for each multiprocessor of an H100 or H200: unpacking hides behind loads


@dataclass(frozen=True, kw_only=True)
class Config:
    """`rows` queries of a tile; the sequence is read in `splits` parts side by side."""

    rows: int
    splits: int
    warps: int = 4
    stages: int = 2


def heuristic(batch: int, heads: int, rows: int, tokens: int) -> Config:
    """For [batch, heads] of `rows` queries over `tokens` packed tokens."""
    tile_rows = min(power_of_two(rows, least=16), 64)
    programs = batch * heads * blocks_of(rows, tile_rows)
    # What the splits write stays below what they read.
    most = min(blocks_of(tokens, 256), tokens // (16 * rows))
    splits = min(blocks_of(PROGRAMS, programs), most)
    return Config(rows=tile_rows, splits=max(splits, 1))


def candidates(batch: int, heads: int, rows: int, tokens: int) -> list[Config]:
    """Tilings worth timing for such sizes, the heuristic's first."""
    first = heuristic(batch, heads, rows, tokens)
    splits = near(first.splits, most=blocks_of(tokens, 64))
    return around(first, {"splits": splits, "warps": (2, 4, 8), "stages": (2, 3)})
