"""Tilings of attention over selected heads."""

from dataclasses import dataclass

from pallas_kernels.shapes import blocks_of, power_of_two
from pallas_kernels.tuned import around, near

PROGRAMS = 264  # two for each multiprocessor of an H100 or H200


@dataclass(frozen=True, kw_only=True)
class Config:
    """`keys` keys of a tile; `splits` parts of the sequence run side by side."""

    keys: int
    splits: int
    warps: int = 4
    stages: int = 2


def heuristic(batch: int, selected: int, rows: int, keys: int, width: int) -> Config:
    """For at most `selected` heads of size `width` in each row, with `rows` query heads of each,
    over `keys` keys."""
    large = rows > 16  # its scores and sums would spill from 4 warps
    tile_keys = min(power_of_two(keys, least=16), 32 if large or power_of_two(width) > 128 else 64)
    splits = min(blocks_of(PROGRAMS, batch * selected), blocks_of(keys, 4 * tile_keys))
    return Config(keys=tile_keys, splits=max(splits, 1), warps=8 if large else 4)


def candidates(batch: int, selected: int, rows: int, keys: int, width: int) -> list[Config]:
    """Tilings worth timing for such sizes, the heuristic's first."""
    first = heuristic(batch, selected, rows, keys, width)
    splits = near(first.splits, most=blocks_of(keys, first.keys))
    tiles = {"keys": near(first.keys, least=16, most=128), "splits": splits, "stages": (2, 3)}
    return around(first, tiles, {"warps": (2, 4, 8)})
