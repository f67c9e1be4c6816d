"""How alike two vectors are."""

import numpy as np


def normalised_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The cosine of `a` and `b`, each less its mean over the last axis, in [-1, 1]; 0 where one of
    them is constant. Leading axes broadcast.

    It says nothing of scale: `a` and 1000 a + 1 correlate perfectly with whatever either does.
    """
    a, b = (x - x.mean(axis=-1, keepdims=True) for x in (a, b))
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.where(lengths > 0, (a * b).sum(axis=-1) / np.where(lengths > 0, lengths, 1), 0.0)
