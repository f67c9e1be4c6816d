"""Filters to distil, made in NumPy: sums of modes, and the implicit filters of a random Hyena."""

import numpy as np


def sums_of_modes(filters: int, modes: int, lags: int, seed: int = 0, least=0.9, most=0.995):
    """Poles, residues [F, K] and responses [F, L] (h_0 = 0) as in laughing_hyena.md 5.1."""
    random = np.random.default_rng(seed)
    shape = (filters, modes)
    angles = random.uniform(0.05, np.pi - 0.05, shape)
    poles = random.uniform(least, most, shape) * np.exp(1j * angles)
    residues = random.normal(size=shape) + 1j * random.normal(size=shape)
    powers = poles[..., None] ** np.arange(lags - 1)
    tail = np.einsum("fk,fkt->ft", residues, powers).real
    return poles, residues, np.pad(tail, ((0, 0), (1, 0)))


def hyena_filters(lags: int, channels: int = 8, width: int = 64, seed: int = 0):
    """Of `channels` channels spread over a random Hyena layer, slow to fast windows: 33 features,
    sine frequency 14, weights of N(0, 0.02^2), as in laughing_hyena.md 2.2 and 5.2."""
    random = np.random.default_rng(seed)
    steps = np.arange(lags)
    share, turn = steps / (lags - 1), 2 * np.pi * steps / lags
    bands = np.linspace(1e-4, 15, 16)
    x = np.concatenate(
        [share[:, None], np.cos(bands * turn[:, None]), -np.sin(bands * turn[:, None])], axis=1
    )
    for inputs in (33, width, width):
        x = np.sin(14 * (x @ random.normal(0, 0.02, (inputs, width))))
    h = x @ random.normal(0, 0.02, (width, width))
    decay = np.abs(np.linspace(np.log(1e-2) / 1.5, np.log(1e-2) / 0.3, width))
    h = h * np.exp(-share[:, None] * decay)
    return h.T[np.linspace(0, width - 1, channels).round().astype(int)]
