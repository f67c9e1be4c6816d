"""Tilings of the sparse feed-forward block."""

from dataclasses import dataclass

from pallas_kernels.shapes import blocks_of, power_of_two
from pallas_kernels.tuned import around, near

PROGRAMS = 264  # two for each multiprocessor of an H100 or H200


@dataclass(frozen=True, kw_only=True)
class Config:
    """A program of "up" reads `depth` columns of `neurons` neurons at a time; one of "down" reads
    `columns` columns of `chain` neurons at a time and owns one of `splits` parts of the list.

    All but `splits` are powers of two, and at least 16 where rows share a list.
    """

    neurons: int
    depth: int
    columns: int
    chain: int
    splits: int
    warps: int = 4
    stages: int = 3


def heuristic(rows: int, lists: int, width: int, places: int, itemsize: int) -> Config:
    """For `lists` lists of at most `places` neurons of `width` weights, each shared by `rows`."""
    columns, chain, warps = 128 if width >= 2048 else 64, 64, 4
    if rows == 1:  # no matrix unit: few neurons, so that many programs read side by side
        neurons, depth = 8, 512 if width >= 2048 else 256
    elif itemsize > 2 and rows > 16:  # float32 products are made in registers, and would spill
        neurons, depth, columns, chain, warps = 32, 32, 64, 32, 8
    else:
        neurons, depth = 32, 128 if rows <= 32 else 64
    whole = power_of_two(width, least=16)
    columns = min(columns, whole)
    programs = blocks_of(width, columns) * lists * blocks_of(rows, row_tile(rows))
    splits = min(blocks_of(PROGRAMS, programs), blocks_of(places, 4 * chain))
    return Config(
        neurons=neurons,
        depth=min(depth, whole),
        columns=columns,
        chain=chain,
        splits=max(splits, 1),
        warps=warps,
    )


def row_tile(rows: int) -> int:
    """How many rows a program takes: one, or what the matrix unit needs."""
    return 1 if rows == 1 else min(power_of_two(rows, least=16), 64)


def candidates(rows: int, lists: int, width: int, places: int, itemsize: int) -> list[Config]:
    """Tilings worth timing for such sizes, the heuristic's first."""
    first = heuristic(rows, lists, width, places, itemsize)
    least, whole = 1 if rows == 1 else 16, power_of_two(width, least=16)
    splits = near(first.splits, most=blocks_of(places, first.chain))
    return around(
        first,
        {"neurons": near(first.neurons, least, most=64), "warps": (4, 8)},
        {"columns": near(first.columns, 16, min(whole, 256)), "splits": splits},
        {"depth": near(first.depth, 16, whole)},
        {"chain": near(first.chain, 16), "stages": (2, 3)},
    )
