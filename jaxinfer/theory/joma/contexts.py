"""What one layer is trained on: counts of tokens in a context, a query token, a label."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from jaxinfer.arguments import one_of, whole


@dataclass(frozen=True)
class Contexts:
    """N examples over M context tokens, Q query tokens and C classes."""

    x: np.ndarray  # float64[N, M], counts or frequencies, none below 0 and no row empty
    query: np.ndarray  # int[N], which query token asks
    label: np.ndarray  # int[N]
    queries: int
    classes: int

    def __post_init__(self):
        whole("queries", self.queries)
        whole("classes", self.classes, 2)
        if self.x.ndim != 2 or not self.x.size:
            raise ValueError(f"x must be [N, M] with examples, got {list(self.x.shape)}")
        if not (np.isfinite(self.x).all() and (self.x >= 0).all() and self.x.any(axis=1).all()):
            raise ValueError("x must be finite and not negative, with a token in every context")
        for name, values, most in (
            ("query", self.query, self.queries), ("label", self.label, self.classes)
        ):  # fmt: skip
            if values.shape != self.x.shape[:1] or values.dtype.kind not in "iu":
                raise ValueError(f"{name} must be whole numbers, one for each of {len(self.x)}")
            if values.min() < 0 or values.max() >= most:
                raise ValueError(f"{name} must be below {most}, got {values.max()}")


def multinomial_contexts(
    examples: int = 256, tokens: int = 12, classes: int = 4, queries: int = 1, *, length: int = 16,
    concentration: float = 0.5, seed: int = 0,
) -> Contexts:  # fmt: skip
    """Contexts of `length` tokens drawn by the law of their class, itself drawn from a Dirichlet
    distribution; `x` are frequencies, queries and classes equally likely."""
    rng = np.random.default_rng(seed)
    laws = rng.dirichlet(np.full(tokens, concentration), classes)
    label = rng.integers(classes, size=examples)
    x = np.stack([rng.multinomial(length, laws[one]) for one in label]) / length
    return Contexts(x, rng.integers(queries, size=examples), label, queries, classes)


def overlapping_contexts(kind: Literal["gaussian", "random"] = "gaussian", seed: int = 0):
    """The 20 contexts of the paper's figures 2 and 3, one per class, over 20 tokens and one query.

    Ten tokens are common to all classes with random frequencies. With "gaussian" the other ten are
    a bump of its own place for each class; with "random" they are random as well. Columns (here
    rows) are normalised to length 1.
    """
    one_of("kind", kind, ("gaussian", "random"))
    x = np.random.default_rng(seed).uniform(size=(20, 20)) / 2
    if kind == "gaussian":
        x[:, :10] = np.exp(-((np.arange(10) - 10 * np.arange(20)[:, None] / 20) ** 2) / 30)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return Contexts(x, np.zeros(20, int), np.arange(20), 1, 20)
