"""The discrete map of the paper's figure 4: softmax attention, nonlinear activation."""

from dataclasses import dataclass

import numpy as np
from scipy.special import softmax

from jaxinfer.arguments import real, whole
from jaxinfer.theory.joma.vectors import Numbers, finite_array
from jaxinfer.theory.measures.attention import entropy


@dataclass(frozen=True)
class Map:
    """`v` before each iteration [S, M] and the entropy of the attention it stands for [S]."""

    v: np.ndarray
    entropy: np.ndarray


def salience_map(
    mu: Numbers, *, step: float = 0.02, temperature: float = 3.0, start: float = 0.05,
    iterations: int = 5000,
) -> Map:  # fmt: skip
    """v <- v + step (mu - v) softmax(v^2 / T), from `start` in every component; NumPy float64.

    The repository of the paper draws figure 4 so, with T = 3: with T = 2 it would be Euler's rule
    for `solve("softmax", mu=...)`.
    """
    mu = finite_array("mu", mu)
    v = np.empty((whole("iterations", iterations, 2, 10**7), len(mu)))
    step, temperature = real("step", step, 0, 1), real("temperature", temperature, 1e-6, 1e6)
    v[0] = real("start", start)
    for i in range(1, len(v)):
        v[i] = v[i - 1] + step * (mu - v[i - 1]) * softmax(np.square(v[i - 1]) / temperature)
    return Map(v, entropy(softmax(np.square(v) / temperature, axis=-1)))
