"""`check`: what gradient flow of one layer conserves, held against a training (Theorem 1).

With g_k the backpropagated gradient (minus dLoss/dh_k), s = sum_k g_k phi'_k (b . v_k), r the
learning-rate ratio, and sums over the Q queries that share the nodes, these are constant:

    linear   sum_m z_m^2 - r sum_k v_k^2
    exp      sum_m z_m - r / T sum_k v_k^2 / 2
    softmax  sum_m z_m - r / T (sum_k v_k^2 / 2 - int E[b s] dt)

all of them exactly. The paper's form for softmax is approximate:

    softmax  sum_m z_m - r / T (sum_k v_k^2 - bbar sum_k |v_k|^2) / 2

Exact means: for any loss, any activation, trained or frozen top layer, moving gradients; what is
needed is gradient flow, orthonormal frozen embeddings and free logits. A step of size eta leaves an
error of the order of eta. Adam, momentum, weight decay, clipping and low-rank logits break them.
The sum over queries is needed: with shared nodes no single query conserves anything.
"""

from dataclasses import dataclass

import numpy as np

from jaxinfer.arguments import of_kind
from jaxinfer.theory.joma.trainer import Training
from jaxinfer.theory.measures.correlation import normalised_correlation


@dataclass(frozen=True)
class Sides:
    """Both sides of an identity, as changes since the start, float64[M]."""

    left: np.ndarray
    right: np.ndarray

    @property
    def relative_error(self) -> float:
        """|left - right| / |left|."""
        return float(np.linalg.norm(self.left - self.right) / np.linalg.norm(self.left))

    @property
    def correlation(self) -> float:
        """Normalised correlation, which hides a wrong scale."""
        return float(normalised_correlation(self.left, self.right))


@dataclass(frozen=True)
class Invariants:
    """What `check` found.

    `exact`: the identity that holds up to the step size. `paper`: the paper's form for softmax,
    None for linear and exp attention, where the exact identity is the paper's. `first_term`: its
    first term alone. `logit_sum`: by how much the sum of a query's logits has moved at most, which
    softmax attention conserves.
    """

    exact: Sides
    paper: Sides | None
    first_term: Sides | None
    logit_sum: float


def check(training: Training, record: int = -1) -> Invariants:
    """Both sides of the conservation laws between the start of a training and one of its records.

    Raises:
        ValueError: if there is no such record, or it is the start.
    """
    of_kind("training", training, Training, "what train_layer() returns")
    count = len(training.step)
    if not -count <= record < count or record % count == 0:
        raise ValueError(f"record must be from 1 to {count - 1}, got {record}")
    kept = training.records
    v, z, query = ((x[0], x[record]) for x in (kept.layer.v, kept.layer.z, kept.layer.query))
    gain = training.ratio / (1.0 if training.attention == "linear" else training.temperature)
    squares = np.square(v[1]).sum(axis=1) - np.square(v[0]).sum(axis=1)
    moved = (z[1] - z[0]).sum(axis=1)
    drift = float(np.abs(moved).max())
    if training.attention == "linear":
        left = (np.square(z[1]) - np.square(z[0])).sum(axis=0)
        return Invariants(Sides(left, gain * squares), None, None, drift)
    left, first = (z[1] - z[0]).sum(axis=0), gain * squares / 2
    if training.attention == "exp":
        return Invariants(Sides(left, first), None, None, drift)
    x = training.contexts.x
    mean = (x / x.sum(axis=1, keepdims=True)).mean(axis=0)  # bbar at uniform attention
    total = sum(float(np.square(w[1]).sum() - np.square(w[0]).sum()) for w in (v, query))
    return Invariants(
        Sides(left, first - gain * kept.drift[record].sum(axis=0)),
        Sides(left, first - gain * mean * total / 2), Sides(left, first), drift,
    )  # fmt: skip
