"""Points in the order of a balanced kd-tree, whose leaves and cells are runs of equal length."""

from dataclasses import dataclass

import numpy as np

LEAF = 32  # points at most


@dataclass(frozen=True)
class Leaves:
    """An order of points in which every leaf has `size` places.

    A leaf with a point less repeats one; of the places of one point only the first is `real`.
    """

    order: np.ndarray  # i[L * size], the point at every place
    real: np.ndarray  # bool[L * size]
    count: int  # leaves, a power of two
    size: int

    def back(self, values: np.ndarray) -> np.ndarray:
        """Values by place as values by point."""
        out = np.empty((int(self.real.sum()), *values.shape[1:]), values.dtype)
        out[self.order[self.real]] = values[self.real]
        return out


def leaves_of(points: np.ndarray, largest: int = LEAF) -> Leaves:
    """Halves at the median of the widest dimension until no part has more than `largest` points."""
    count = 1
    while -(-len(points) // count) > largest:
        count *= 2
    parts = [np.arange(len(points))]
    while len(parts) < count:
        parts = [half for part in parts for half in _halves(points, part)]
    size = max(map(len, parts))
    order = np.concatenate([np.resize(part, size) for part in parts])
    real = np.concatenate([np.arange(size) < len(part) for part in parts])
    return Leaves(order, real, count, size)


def _halves(points: np.ndarray, part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values = points[part]
    widest = np.argmax(values.max(axis=0) - values.min(axis=0))
    middle = (len(part) + 1) // 2
    ranked = part[np.argpartition(values[:, widest], middle)]
    return ranked[:middle], ranked[middle:]
