"""Groups the neurons of a block into blocks of one size, so that whole blocks can be left out.

Neurons with similar input weights are active for the same tokens, so balanced k-means of these
weights makes blocks that are needed, or not, as a whole (MoEfication, arXiv 2110.01786, section
3.2; LTE, 2402.06126, section 4.1). The order of a block's neurons does not matter to it, so the
groups become its blocks by another order and the model stays what it was.

Axis letters: F neurons, D width, J groups.
"""

import warnings
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.cluster.vq import kmeans2

from jaxinfer.nn.quantized import StoredWeight
from jaxinfer.typing import Params


@dataclass(frozen=True, eq=False)
class Grouping:
    """`labels[i]` is the group of neuron i. `inertia` is the sum of the squared distances of all
    neurons from their group's mean, after each round: it never grows."""

    labels: Int[np.ndarray, " F"]
    inertia: tuple[float, ...]

    @property
    def order(self) -> Int[np.ndarray, " F"]:
        """The neurons group by group; within a group as they were."""
        return np.argsort(self.labels, kind="stable").astype(np.int32)


def group_neurons(
    features: Float[np.ndarray, "F D"], size: int, *, seed: int = 0, rounds: int = 50
) -> Grouping:
    """Groups of exactly `size` neurons by balanced k-means, the same for the same seed.

    Plain k-means from random neurons gives the first centres. Each round then assigns the neurons
    anew, the best that groups of one size can be for these centres, and takes the means; it ends
    when that no longer helps.

    Raises:
      ValueError: the size does not divide the neurons, or a feature is not finite.
    """
    neurons = len(features)
    if size < 1 or neurons % size:
        raise ValueError(f"{neurons} neurons cannot be cut into blocks of {size}")
    x = np.asarray(features, np.float64)
    if not np.isfinite(x).all():
        raise ValueError("the input weights of a block hold numbers that are not finite")
    groups = neurons // size
    some = np.random.default_rng(seed).choice(neurons, groups, replace=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # an empty group is filled below
        centres, _ = kmeans2(x, x[some], iter=20, minit="matrix")
    labels, inertia = np.zeros(neurons, np.int64), [np.inf]
    for _ in range(rounds):
        new = assigned(_distances(x, centres), size)
        centres = np.stack([x[new == j].mean(axis=0) for j in range(groups)])
        value = float(((x - centres[new]) ** 2).sum())
        if value >= inertia[-1] * (1 - 1e-9):
            break
        labels, inertia = new, [*inertia, value]
    return Grouping(labels, tuple(inertia[1:]))


def input_weights(block: Params) -> Float[np.ndarray, "F D"]:
    """What neurons are grouped by: their input weights, of gated blocks those of the gate (arXiv
    2402.06126, footnote 2), scaled to length 1."""
    weight = block.get("gate", block["up"])["weight"]
    if isinstance(weight, StoredWeight):
        raise ValueError(
            "neurons are grouped by floating weights, got a block that is stored in fewer bits; "
            "load the model without `weights`"
        )
    weight = np.asarray(weight, np.float64)
    length = np.linalg.norm(weight, axis=1, keepdims=True)
    return weight / np.where(length > 0, length, 1)


def assigned(cost: Float[np.ndarray, "F J"], size: int) -> Int[np.ndarray, " F"]:
    """The group of each neuron with the least total cost when every group gets `size` neurons.

    Exact, at every size. It begins with each neuron's cheapest group and moves neurons along the
    cheapest chains from groups with too many to groups with too few; a chain that is the cheapest
    keeps what is assigned the best for its counts (successive shortest paths, Ahuja, Magnanti and
    Orlin, Network Flows, section 9.7). One path is searched among the J groups, not the F neurons.
    """
    groups = cost.shape[1]
    labels = cost.argmin(axis=1)
    count = np.bincount(labels, minlength=groups)
    step = np.full((groups, groups), np.inf)  # the cheapest move of one neuron from a to b
    mover = np.zeros((groups, groups), np.int64)  # and which neuron that is

    def refresh(a: int) -> None:
        members = np.flatnonzero(labels == a)
        step[a] = np.inf
        if len(members):
            moves = cost[members] - cost[members, a, None]
            best = moves.argmin(axis=0)
            step[a], mover[a] = moves.min(axis=0), members[best]

    for a in range(groups):
        refresh(a)
    slack = 1e-12 * np.abs(cost).max(initial=1.0)  # rounding is no shorter path
    while (count > size).any():
        before = _shortest(step, count > size, slack)
        b = int(np.where(count < size, before.length, np.inf).argmin())
        path = [b]
        while (a := int(before.group[path[-1]])) >= 0:
            path.append(a)
        count[path[0]] += 1
        count[path[-1]] -= 1
        moved = [(mover[a, b], b) for b, a in zip(path, path[1:], strict=False)]
        for neuron, b in moved:
            labels[neuron] = b
        for a in path:
            refresh(a)
    return labels


@dataclass(frozen=True, eq=False)
class _Paths:
    length: np.ndarray  # f64[J], from the nearest start
    group: np.ndarray  # i64[J], the one before, -1 at a start


def _shortest(step: np.ndarray, starts: np.ndarray, slack: float) -> _Paths:
    """The shortest paths from any start (Bellman-Ford: moves may gain, but no cycle does)."""
    groups = len(step)
    length = np.where(starts, 0.0, np.inf)
    before = np.full(groups, -1)
    for _ in range(groups):
        through = length[:, None] + step
        last = through.argmin(axis=0)
        shorter = through[last, np.arange(groups)] < length - slack
        if not shorter.any():
            break
        length = np.where(shorter, through[last, np.arange(groups)], length)
        before = np.where(shorter, last, before)
    return _Paths(length, before)


def _distances(x: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Squared, f64[F, J]."""
    return (x**2).sum(axis=1)[:, None] - 2 * x @ centres.T + (centres**2).sum(axis=1)
