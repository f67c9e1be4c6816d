"""One candidate for every layer, of the least predicted loss that fits into a budget.

This is the multiple-choice knapsack, solved exactly as an integer program (ours; the losses are
those of `Diagnosis.losses`, which add up over layers by assumption).
"""

import math

import numpy as np
from jaxtyping import Float, Int

from jaxinfer.theory.extra import needed

MOST_TRIES = 20  # a solver's feasibility is within a tolerance; so often the budget is tightened


def allocate(
    losses: Float[np.ndarray, "L C"], sizes: Int[np.ndarray, "L C"], budget: int
) -> Int[np.ndarray, " L"]:
    """The candidate of each layer, such that `losses` add up to the least of all choices whose
    `sizes` add up to at most `budget`.

    Args:
      losses: what layer l loses with candidate c; finite.
      sizes: its bytes, not negative.
      budget: bytes of all layers together.

    Raises:
      ValueError: the budget is below that of the smallest candidates, or a loss is not finite.

    Example:
      >>> import numpy as np
      >>> allocate(np.array([[3.0, 0.0], [1.0, 0.0]]), np.array([[1, 9], [1, 9]]), 10).tolist()
      [1, 0]
    """
    if not np.isfinite(losses).all():
        layer, candidate = np.argwhere(~np.isfinite(losses))[0]
        raise ValueError(f"the loss of layer {layer} with candidate {candidate} is not finite")
    least = check_budget(sizes, budget)
    unit = max(math.gcd(*map(int, sizes.ravel())), 1)
    weights, capacity = sizes // unit, budget // unit
    scale = np.abs(losses).max() or 1.0
    for _ in range(MOST_TRIES):
        chosen = _solved(losses / scale, weights, capacity)
        excess = int(np.take_along_axis(weights, chosen[:, None], axis=1).sum()) - budget // unit
        if excess <= 0:
            return chosen
        capacity = max(capacity - excess, least // unit)
    return sizes.argmin(axis=1)


def check_budget(sizes: Int[np.ndarray, "L C"], budget: int) -> int:
    """The bytes of the smallest choice, to which the budget must suffice."""
    least = int(sizes.min(axis=1).sum())
    if budget < least:
        raise ValueError(
            f"a budget of {budget} bytes is below the {least} of the smallest candidate in every "
            "layer; raise it, or add smaller candidates"
        )
    return least


def _solved(losses: np.ndarray, weights: np.ndarray, capacity: int) -> np.ndarray:
    optimize = needed("scipy.optimize", "choosing policies per layer")
    sparse = needed("scipy.sparse", "choosing policies per layer")
    layers, candidates = losses.shape
    each = sparse.kron(sparse.eye(layers), np.ones((1, candidates)))
    found = optimize.milp(
        losses.ravel(),
        integrality=np.ones(losses.size),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(each, 1, 1),
            optimize.LinearConstraint(weights.reshape(1, -1), -np.inf, capacity),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise ValueError(f"no choice of policies was found: {found.message}")
    return np.asarray(found.x).reshape(losses.shape).argmax(axis=1)
