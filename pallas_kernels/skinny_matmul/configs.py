"""Tilings of the products of a few rows."""

from dataclasses import dataclass

from pallas_kernels.shapes import blocks_of, power_of_two
from pallas_kernels.tuned import around, near

PROGRAMS = 264  # two for each multiprocessor of an H100 or H200
DOT_ROWS = 16  # the least that a matrix unit takes
NUMBERS = 4096  # of a weight that a program of a single row loads at once
STAGED = 8192  # bytes of a weight that a program of several rows loads ahead, three times


@dataclass(frozen=True, kw_only=True)
class Config:
    """A program multiplies `rows` activations (1: multiply and sum, else a dot) by `outputs` rows
    of a weight, `depth` inputs at a time; all are powers of two."""

    rows: int
    outputs: int
    depth: int
    warps: int = 4
    stages: int = 3

    def __post_init__(self) -> None:
        if self.rows not in (1, DOT_ROWS):
            raise ValueError(f"rows of a tile are 1 or {DOT_ROWS}, got {self.rows}")
        least = 1 if self.rows == 1 else 16
        for name in ("outputs", "depth"):
            size = getattr(self, name)
            if size < least or size & (size - 1):
                raise ValueError(f"{name} must be a power of two of at least {least}, got {size}")


def heuristic(rows: int, inputs: int, outputs: int, itemsize: int) -> Config:
    """For `rows` activations of `inputs` numbers and all results' `outputs`."""
    if rows == 1:  # a thread loads 16 bytes four times, and behind the loop programs sum once
        tile = _filling(outputs, most=8, least=1)
        depth = min(power_of_two(inputs), NUMBERS // tile, 1024)
        return Config(rows=1, outputs=tile, depth=depth)
    tile = _filling(outputs, most=32, least=16)
    depth = STAGED // (tile * itemsize)  # of float32 less: its products are made in registers
    depth = min(power_of_two(inputs, least=16), depth if itemsize == 2 else depth // 2)
    return Config(rows=DOT_ROWS, outputs=tile, depth=depth, stages=4)


def _filling(outputs: int, most: int, least: int) -> int:
    """The largest tile of outputs that leaves enough programs to fill a device."""
    tile = most
    while tile > least and blocks_of(outputs, tile) < PROGRAMS:
        tile //= 2
    return tile


def candidates(rows: int, inputs: int, outputs: int, itemsize: int) -> list[Config]:
    """Tilings worth timing for such sizes, the heuristic's first."""
    first = heuristic(rows, inputs, outputs, itemsize)
    least = 1 if rows == 1 else 16
    tiles = {
        "outputs": near(first.outputs, least, most=64),
        "depth": near(first.depth, least, most=power_of_two(inputs, least)),
    }
    return around(first, tiles, {"warps": (1, 2, 4, 8)}, {"stages": (2, 3, 4)})
