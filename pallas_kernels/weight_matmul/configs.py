"""Tilings of the product with a quantized weight."""

from dataclasses import dataclass

from pallas_kernels.common import blocks_of, power_of_two
from pallas_kernels.tuned import around, near

MULTIPROCESSORS = 132  # of an H100 or H200


@dataclass(frozen=True, kw_only=True)
class Config:
    """`rows` activations (1: multiply and sum, else a dot of 16 to 64) by `words` words of codes;
    `splits` parts of the inputs run side by side. Multiply and sum takes `depth` inputs a step."""

    rows: int
    words: int
    splits: int
    depth: int = 16
    warps: int = 4
    stages: int = 3

    def __post_init__(self) -> None:
        if self.rows != 1 and self.rows not in (16, 32, 64):
            raise ValueError(f"rows of a tile are 1, 16, 32 or 64, got {self.rows}")
        for name in ("words", "depth"):
            size = getattr(self, name)
            if size < 8 or size & (size - 1):
                raise ValueError(f"{name} must be a power of two of at least 8, got {size}")


def heuristic(rows: int, words: int, groups: int) -> Config:
    """For `rows` activations and a weight of `words` words an input, `groups` groups of inputs."""
    tile_rows = 1 if rows == 1 else min(power_of_two(rows, least=16), 64)
    # 32 words are a line of the cache; eight sums of [64, 32] need the registers of 8 warps.
    words_of_tile, warps = 32, 4 if tile_rows <= 16 else 8
    programs = blocks_of(rows, tile_rows) * blocks_of(words, words_of_tile)
    # As many as run at once and no second wave; a split of many rows is dear, as XLA adds them up.
    resident = MULTIPROCESSORS * {1: 4, 16: 2}.get(tile_rows, 1)
    part = blocks_of(groups, min(max(resident // programs, 1), groups))
    return Config(
        rows=tile_rows, words=words_of_tile, splits=blocks_of(groups, part), warps=warps
    )  # fmt: skip


def candidates(rows: int, words: int, groups: int) -> list[Config]:
    """Tilings worth timing for such sizes, the heuristic's first; no split of one is empty."""
    first = heuristic(rows, words, groups)
    parts = (blocks_of(groups, splits) for splits in near(first.splits, most=groups))
    tiles = {"words": near(first.words, least=8), "splits": [blocks_of(groups, n) for n in parts]}
    if first.rows == 1:
        depth = near(first.depth, least=8, most=first.depth)
        return around(first, tiles | {"depth": depth}, {"warps": (2, 8)})
    return around(first, tiles | {"warps": (4, 8)}, {"stages": (2, 4)})
