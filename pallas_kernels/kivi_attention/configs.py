"""Tilings of attention over packed codes."""

from dataclasses import dataclass

from pallas_kernels.shapes import blocks_of, power_of_two
from pallas_kernels.tuned import around, near

WORDS = 16  # of keys, which are the rows of a tile
PROGRAMS = 12 * 132  # as many warps as run at once on an H100 or H200, by their registers
TURN = 4  # lanes of a word at a time


@dataclass(frozen=True, kw_only=True)
class Config:
    """`rows` queries of a tile; the sequence is read in `splits` parts side by side. `lanes` codes
    of a word of keys are taken at a time, `pieces` parts of the channels after one another."""

    rows: int
    splits: int
    lanes: int = TURN
    pieces: int = 4
    warps: int = 1
    stages: int = 2


def heuristic(
    batch: int, heads: int, rows: int, tokens: int, width: int, itemsize: int, key_bits: int
) -> Config:
    """For [batch, heads] of `rows` queries of `width` numbers over `tokens` packed tokens."""
    tile_rows = min(power_of_two(rows, least=8), 64)
    warps = max(tile_rows // 16, 1)
    programs = batch * heads * blocks_of(rows, tile_rows) * warps
    # What the splits write stays below what they read.
    most = min(blocks_of(tokens, 256), tokens // (16 * rows))
    splits = min(max(PROGRAMS // programs, 1), most)
    # More lanes at a time read the words of keys less often, and need more registers, of which
    # float32 has none to spare.
    lanes, piece = (TURN, 32) if itemsize == 2 else (1, 16)
    return Config(
        rows=tile_rows, splits=max(splits, 1), lanes=lanes, pieces=max(width // piece, 1),
        warps=warps,
    )  # fmt: skip


def candidates(
    batch: int, heads: int, rows: int, tokens: int, width: int, itemsize: int, key_bits: int
) -> list[Config]:
    """Tilings worth timing for such sizes, the heuristic's first."""
    first = heuristic(batch, heads, rows, tokens, width, itemsize, key_bits)
    splits = near(first.splits, most=blocks_of(tokens, 256))
    lanes = {first.lanes, min(2 * first.lanes, 32 // key_bits)}
    pieces = {first.pieces, min(2 * first.pieces, max(width // 16, 1))}
    tiles = {"splits": splits, "lanes": sorted(lanes), "pieces": sorted(pieces)}
    return around(first, tiles, {"stages": (2, 3)})
