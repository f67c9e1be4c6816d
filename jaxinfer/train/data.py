"""Token windows for training: documents in one memory-mapped uint16 file, windows in a seeded
order.

Every document is followed by the end-of-text token and all are laid end to end; a window is T+1
consecutive tokens (T inputs and their successors), so windows cross documents and nothing is
padded. Which windows make up step s depends on (seed, s) alone: resuming needs no iterator
state. Each epoch has its own permutation and its own shift of the window grid.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxinfer.files import replacing

_SHIFT_STREAM, _ORDER_STREAM = 1, 2


def write_tokens(path: Path, documents: Iterable[Sequence[int]], end: int) -> int:
    """Writes the documents' tokens with `end` after each, atomically; returns the token count."""
    count = 0
    with replacing(path) as temporary, open(temporary, "wb") as file:
        for tokens in documents:
            row = np.asarray([*tokens, end])
            if row.min() < 0 or row.max() > np.iinfo(np.uint16).max:
                raise ValueError(
                    f"token ids span {row.min()}..{row.max()} but the token file holds uint16; "
                    "use a vocabulary of at most 65536 entries"
                )
            row.astype("<u2").tofile(file)
            count += len(row)
    return count


@dataclass(frozen=True)
class TokenWindows:
    """Batches i32[B, T+1] of a token file; `batch(step)` is a pure function of seed and step."""

    path: Path
    length: int  # T, the number of positions trained on per window
    batch_size: int
    seed: int = 0

    def __post_init__(self):
        if self.length < 1 or self.batch_size < 1:
            raise ValueError(
                f"length and batch_size must be positive, got {self.length} and {self.batch_size}"
            )
        if self.windows_per_epoch < 1:
            raise ValueError(
                f"{self.path} holds {self.num_tokens} tokens, too few for one window of "
                f"{self.length}; use a shorter length or more text"
            )

    @property
    def num_tokens(self) -> int:
        return os.path.getsize(self.path) // 2

    @property
    def windows_per_epoch(self) -> int:
        """Windows left whatever the epoch's shift (up to T-1 tokens) is."""
        return (self.num_tokens - self.length) // self.length

    def batch(self, step: int) -> np.ndarray:
        """The windows of one step; consecutive steps walk through each epoch's permutation."""
        tokens = np.memmap(self.path, dtype="<u2", mode="r")
        first = step * self.batch_size
        rows = [self._window(tokens, i) for i in range(first, first + self.batch_size)]
        return np.stack(rows).astype(np.int32)

    def _window(self, tokens: np.ndarray, index: int) -> np.ndarray:
        epoch, place = divmod(index, self.windows_per_epoch)
        shift = np.random.default_rng([self.seed, epoch, _SHIFT_STREAM]).integers(self.length)
        start = int(shift) + self.length * int(self._order(epoch)[place])
        return tokens[start : start + self.length + 1]

    def _order(self, epoch: int) -> np.ndarray:
        key = (self.seed, epoch, self.windows_per_epoch)
        if key not in _ORDERS:
            _ORDERS.clear()  # one epoch at a time is enough
            generator = np.random.default_rng([self.seed, epoch, _ORDER_STREAM])
            _ORDERS[key] = generator.permutation(self.windows_per_epoch)
        return _ORDERS[key]


# The last permutation, so that a step does not shuffle the whole epoch again.
_ORDERS: dict[tuple[int, int, int], np.ndarray] = {}
