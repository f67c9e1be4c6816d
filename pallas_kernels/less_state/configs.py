"""Tilings of the low-rank state's kernels."""

from dataclasses import dataclass

from pallas_kernels.shapes import blocks_of
from pallas_kernels.tuned import around, near

PROGRAMS = 132  # one for each multiprocessor of an H100 or H200


@dataclass(frozen=True, kw_only=True)
class Config:
    """`rows` queries or keys of a tile, `hidden` columns of the hidden layer at a time."""

    rows: int = 16  # the least that a matrix unit takes
    hidden: int = 64
    warps: int = 4
    stages: int = 2

    def __post_init__(self):
        if min(self.rows, self.hidden) < 16 or (self.rows & -self.rows) != self.rows:
            raise ValueError(
                f"rows and hidden must be powers of two from 16 on, got {self.rows} and "
                f"{self.hidden}"
            )


def heuristic(heads: int, rows: int, together: int = 1) -> Config:
    """For `heads` with `rows` queries or keys each, `together` of which belong to one state.

    A program reads all of a head's weights, so tiles are larger once every multiprocessor has one,
    and for tokens that only one program may add.
    """
    if together > 16 or heads * blocks_of(rows, 32) >= PROGRAMS:
        return Config(rows=32, hidden=16)  # float32 products are made in registers: more spills
    return Config(rows=16, hidden=64)


def candidates(heads: int, rows: int, together: int = 1) -> list[Config]:
    """Tilings worth timing for such sizes, the heuristic's first."""
    first = heuristic(heads, rows, together)
    tiles = near(first.rows, least=16, most=32)
    return around(first, {"rows": tiles, "hidden": (16, 32, 64), "warps": (4, 8)})
