"""How well scores find the units that a block needs, and how many must be taken for that.

Recall is the share of the needed units that are among those selected, averaged over rows; alone it
rewards selecting everything, so it is always given for a number of units. For a batch that computes
the same units for all of its rows, what is needed is what any row needs (`batched`); the search for
capacities per layer and batch follows the tables of Polar Sparsity (arXiv 2505.14884), with the
batch's score as the logarithm of the chance that no row needs a unit, where those use a sum of
rectified logits, which cannot order units of negative logits.

Axis letters: R rows (tokens), J units, C batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

BATCHES = (1, 2, 4, 8, 16, 32, 64)  # rows: powers of two, as `SparseMlp.unions` has them
PARTS = 128  # of a layer's units, by which `allotted` counts


def recall_curve(
    scores: Float[np.ndarray, "R J"], needed: Bool[np.ndarray, "R J"]
) -> Float[np.ndarray, " J"]:
    """The recall of the k best of each row at place k - 1, averaged over the rows that need any
    unit; on a tie the first is better, as in `jaxinfer.sparsity.base.Rule`."""
    some = needed.any(axis=1)
    scores, needed = scores[some], needed[some]
    order = np.argsort(-scores, axis=1, kind="stable")
    found = np.take_along_axis(needed, order, axis=1) / needed.sum(axis=1, keepdims=True)
    return found.mean(axis=0, dtype=np.float64).cumsum().clip(max=1.0)


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """How many units a batch of `rows` takes together, and the recall that it reaches with them."""

    rows: int
    units: int
    recall: float


def by_density(units: int, density: float, multiple: int = 1) -> int:
    """The number of units that are the share `density` of all, rounded up to `multiple`.

    Raises:
      ValueError: the share is not in (0, 1].
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must lie in (0, 1], got {density:g}")
    return _rounded_up(max(round(density * units), 1), multiple, units)


def by_recall(
    curve: Float[np.ndarray, " J"], target: float, *, multiple: int = 1, most: int | None = None
) -> int:
    """The smallest number of units whose recall is at least `target`: a multiple of `multiple`, and
    at most `most`, where the target may be missed."""
    units = len(curve)
    count = int(np.searchsorted(curve, target - 1e-12)) + 1
    return min(_rounded_up(min(count, units), multiple, units), units if most is None else most)


def in_parts(curve: Float[np.ndarray, " J"]) -> tuple[float, ...]:
    """The recall with 1, 2, ... `PARTS` parts of the units, as a file has it."""
    counts = [max(round(part * len(curve) / PARTS), 1) for part in range(1, PARTS + 1)]
    return tuple(round(float(curve[count - 1]), 4) for count in counts)


def allotted(recalls: Sequence[Sequence[float]], density: float) -> list[float]:
    """The share of its units that each layer takes, `density` on average, so that all layers find
    about the same share of what they need: part by part the layer that finds least gets more. It is
    the search per layer of `capacities`, ended by a budget instead of a recall. `recalls` has the
    `in_parts` of each layer."""
    curves = [(0.0, *curve) for curve in recalls]
    taken = [0] * len(curves)
    for _ in range(round(density * PARTS * len(curves))):
        open_layers = [layer for layer, parts in enumerate(taken) if parts < PARTS]
        least = min(open_layers, key=lambda layer: (curves[layer][taken[layer]], taken[layer]))
        taken[least] += 1
    return [parts / PARTS for parts in taken]


def capacities(
    scores: Float[np.ndarray, "R J"],
    needed: Bool[np.ndarray, "R J"],
    target: float,
    *,
    multiple: int = 1,
    most: int | None = None,
) -> list[Capacity]:
    """For each of `BATCHES` the units that reach `target` of what a batch needs; never fewer for a
    larger one. `scores` are logits."""
    found: list[Capacity] = []
    for rows in BATCHES:
        any_row = np.logical_or.reduce(_parts(needed, rows), axis=1)
        curve = recall_curve(batched(scores, rows), any_row)
        units = by_recall(curve, target, multiple=multiple, most=most)
        units = max([units, *(one.units for one in found[-1:])])
        found.append(Capacity(rows=rows, units=units, recall=float(curve[units - 1])))
    return found


def batched(scores: Float[np.ndarray, "R J"], rows: int) -> Float[np.ndarray, "C J"]:
    """One score per batch of `rows` successive rows and unit: for rows of probabilities p = sigmoid
    (score), -log of the product of (1 - p). For one row it orders units as their scores do."""
    return np.logaddexp(_parts(scores, rows).astype(np.float64), 0).sum(axis=1)


def unions(selected: Bool[np.ndarray, "R J"]) -> tuple[float, ...]:
    """The share of the units that batches of `BATCHES` rows use together, when each row has its own
    selection: `SparseMlp.unions`."""
    return tuple(float(_parts(selected, rows).any(axis=1).mean()) for rows in BATCHES)


def shuffled(rows: int, seed: int = 0) -> np.ndarray:
    """An order in which successive rows are of different texts and places."""
    return np.random.default_rng(seed).permutation(rows)


def check_rows(rows: int, what: str) -> None:
    """Raises ValueError unless `rows` rows can form every one of `BATCHES`."""
    if rows < BATCHES[-1]:
        raise ValueError(f"{what}: {rows} tokens are too few, at least {BATCHES[-1]} are needed")


def _parts(x: np.ndarray, rows: int) -> np.ndarray:
    """[batches, rows, J]. All batch sizes take the same rows, and each batch is two of half its
    size, so that its union is at least as large."""
    check_rows(len(x), "capacities by batch")
    return x[: len(x) // BATCHES[-1] * BATCHES[-1]].reshape(-1, rows, x.shape[1])


def _rounded_up(count: int, multiple: int, units: int) -> int:
    return min(-(-count // multiple) * multiple, units)
