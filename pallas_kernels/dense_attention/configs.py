"""Tilings of dense attention."""

from dataclasses import dataclass

from pallas_kernels.shapes import blocks_of, power_of_two
from pallas_kernels.tuned import around, near

PROGRAMS = 528  # four for each multiprocessor of an H100 or H200, all of them at once


@dataclass(frozen=True, kw_only=True)
class Config:
    """`rows` queries and `keys` keys of a tile; `splits` parts of the sequence run side by side."""

    rows: int
    keys: int
    splits: int
    warps: int = 4
    stages: int = 2


def heuristic(batch: int, heads: int, rows: int, keys: int, width: int, itemsize: int) -> Config:
    """For [batch, heads] of `rows` queries over `keys` keys of head size `width`."""
    tile_rows = min(power_of_two(rows, least=16), 64)
    wide = power_of_two(width) * itemsize > 256  # bytes of a key
    tile_keys = min(power_of_two(keys, least=16), 32 if wide or tile_rows > 16 else 64)
    programs = batch * heads * blocks_of(rows, tile_rows)
    # What the splits write stays well below what they read.
    most = min(blocks_of(keys, 4 * tile_keys), keys * itemsize // (16 * rows))
    splits = min(PROGRAMS // programs, most)
    return Config(rows=tile_rows, keys=tile_keys, splits=max(splits, 1))


def candidates(
    batch: int, heads: int, rows: int, keys: int, width: int, itemsize: int
) -> list[Config]:
    """Tilings worth timing for such sizes, the heuristic's first."""
    first = heuristic(batch, heads, rows, keys, width, itemsize)
    splits = near(first.splits, most=blocks_of(keys, first.keys))
    tiles = {"keys": near(first.keys, least=16, most=128), "splits": splits, "stages": (2, 3)}
    return around(first, tiles, {"warps": (2, 4, 8)})


def weight_candidates(
    batch: int, heads: int, rows: int, keys: int, width: int, itemsize: int
) -> list[Config]:
    """As `candidates`, for `key_weights`, which has no splits and no loop to pipeline."""
    first = heuristic(batch, heads, rows, keys, width, itemsize)
    tiles = {"keys": near(first.keys, least=16, most=128), "rows": near(first.rows, 16, 64)}
    return around(first, tiles | {"warps": (4, 8)}, {"warps": (2,)})
