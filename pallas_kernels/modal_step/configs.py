"""Tilings of the modal recurrence."""

import itertools
from dataclasses import dataclass

from pallas_kernels.shapes import blocks_of, power_of_two
from pallas_kernels.tuned import near

ELEMENTS = 1024  # of a tile of modes: two states and four coefficients stay in registers
PROGRAMS = 132  # one for each multiprocessor of an H100 or H200
WARP = 32  # threads


@dataclass(frozen=True, kw_only=True)
class Config:
    """`rows` of the batch and `channels` of a tile, and how many `modes` of them at a time.

    Every thread has a channel of its own: of two that read the same entry, the slower one might
    read what the faster one has written, as the states are updated in place.
    """

    rows: int
    channels: int
    modes: int

    def __post_init__(self):
        sizes = (self.rows, self.channels, self.modes)
        if any(n < 1 or n & (n - 1) for n in sizes) or self.rows * self.channels < WARP:
            raise ValueError(
                "rows, channels and modes must be powers of two, rows times channels at least "
                f"{WARP}, got {self.rows}, {self.channels} and {self.modes}"
            )

    @property
    def warps(self) -> int:
        return min(self.rows * self.channels // WARP, 4)


def heuristic(batch: int, channels: int, modes: int) -> Config:
    """For states of [batch, channels, modes]."""
    group = min(power_of_two(modes), 16)
    tile = min(power_of_two(channels), ELEMENTS // group)
    while tile > WARP and batch * blocks_of(channels, tile) < PROGRAMS:
        tile //= 2
    return Config(rows=max(WARP // tile, 1), channels=tile, modes=group)


def candidates(batch: int, channels: int, modes: int) -> list[Config]:
    """Tilings worth timing for such sizes, the heuristic's first."""
    first = heuristic(batch, channels, modes)
    tiles = itertools.product((1, 2, 4), near(first.channels), near(first.modes, most=first.modes))
    others = (
        Config(rows=rows, channels=width, modes=group)
        for rows, width, group in tiles
        if rows <= batch and rows * width >= WARP and rows * width * group <= 2 * ELEMENTS
    )
    return list(dict.fromkeys([first, *others]))
