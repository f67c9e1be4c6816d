"""Tilings of the product with quantized weights."""

from dataclasses import dataclass

from pallas_kernels.shapes import blocks_of
from pallas_kernels.tuned import around, near

WARPS = 8 * 132  # as many as run at once on an H100 or H200, by their registers
MOST_ROWS = 16  # 8 sums of more would not fit into registers
LEAST_WORDS = 16  # a warp's share: what a tensor core takes


@dataclass(frozen=True, kw_only=True)
class Config:
    """`rows` activations by `words` words of codes, `depth` inputs at a time; `splits` parts of the
    inputs run side by side."""

    rows: int
    words: int
    splits: int
    depth: int = 32
    warps: int = 2
    stages: int = 2

    def __post_init__(self) -> None:
        if self.rows not in (8, MOST_ROWS):
            raise ValueError(f"rows of a tile are 8 or {MOST_ROWS}, got {self.rows}")
        for name in ("words", "depth"):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                raise ValueError(f"{name} must be a power of two of at least 16, got {size}")


def heuristic(rows: int, words: int, groups: int) -> Config:
    """For `rows` activations and weights of `words` words an input in all, `groups` groups."""
    tile_rows = 8 if rows <= 8 else MOST_ROWS
    words_of_tile, warps = 32, 2  # 32 words are a line of the cache
    programs = blocks_of(rows, tile_rows) * blocks_of(words, words_of_tile) * warps
    # As many as run at once and no second wave: a part of one group waits for memory only once.
    part = blocks_of(groups, min(max(WARPS // programs, 1), groups))
    return Config(
        rows=tile_rows, words=words_of_tile, splits=blocks_of(groups, part), warps=warps
    )  # fmt: skip


def candidates(rows: int, words: int, groups: int) -> list[Config]:
    """Tilings worth timing for such sizes, the heuristic's first; no split of one is empty."""
    first = heuristic(rows, words, groups)
    parts = (blocks_of(groups, splits) for splits in near(first.splits, most=groups))
    splits = [blocks_of(groups, n) for n in parts]
    shapes = [(n, n // LEAST_WORDS) for n in (16, 32, 64)]
    found = [
        config
        for words_of_tile, warps in shapes
        for config in around(
            Config(rows=first.rows, words=words_of_tile, splits=first.splits, warps=warps),
            {"splits": splits, "depth": (32, 64)}, {"stages": (2, 3)},
        )
    ]  # fmt: skip
    return list(dict.fromkeys([first, *found]))
