"""What the flows come to, where a formula says so: NumPy float64, A = T = 1 unless given.

All was derived again from the equations of motion; wording of theorems was not held against the
paper's text (arXiv 2310.00535).
"""

import numpy as np
from scipy.integrate import quad
from scipy.special import erf, erfinv

from jaxinfer.arguments import real
from jaxinfer.theory.joma.vectors import Numbers, finite_array


def blow_up_time(delta: Numbers, scale: float = 1.0) -> float:
    """When exp attention with identity activation reaches infinity: A sqrt(pi / 2) / max |delta|.

    Args:
        delta: saliency [M], or [M, K] of K nodes that share their attention. Infinite for zeros.
        scale: A.
    """
    with np.errstate(divide="ignore"):
        return float(scale * np.sqrt(np.pi / 2) / _lengths(delta).max())


def exp_growth(delta: Numbers, time: float, scale: float = 1.0) -> np.ndarray:
    """`v` at `time` from zero, in the shape of `delta`, with exp attention, identity activation.

    The direction of v_l stays that of delta_l, and erf(|v_l| / sqrt 2) = |delta_l| t sqrt(2/pi) / A
    for every token: relative to saliency, all grow alike in erf.

    Raises:
        ValueError: from the blow-up time on.
    """
    end = blow_up_time(delta, scale)
    if not real("time", time, 0) < end:
        raise ValueError(f"time must be below the blow-up time {end:.10g}, got {time:g}")
    return _along(delta, np.sqrt(2) * erfinv(_lengths(delta) * time / scale * np.sqrt(2 / np.pi)))


def exp_limits(delta: Numbers) -> np.ndarray:
    """Where `exp_growth` ends at the blow-up time: infinite for the most salient token, finite for
    every other. Winner takes all."""
    lengths = _lengths(delta)
    return _along(delta, np.sqrt(2) * erfinv(lengths / lengths.max()))


def linear_growth(
    delta: Numbers, time: float, logits: Numbers = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """(`v`, `z`) at `time` from v = 0 and z = `logits`, with linear attention, identity activation:
    z0 sinh(|delta| t) along delta, and z0 cosh(|delta| t)."""
    first = finite_array("logits", logits)
    rate = _lengths(delta) * time
    return _along(delta, first * np.sinh(rate)), first * np.cosh(rate)


def time_to(mu: float, share: float) -> float:
    """When dv/dt = (mu - v) exp(v^2 / 2), from 0, has the `share` (mu - v) / mu left to go."""
    share = real("share", share, 5e-324, 1.0)
    return _integral(lambda u: np.exp(-(mu**2) * np.square(1 - np.exp(-u)) / 2), -np.log(share))


def delay(mu: float) -> float:
    """tau in ln(mu / (mu - v)) = exp(mu^2 / 2) (t - tau) + o(1), as t grows (Theorem 4's rate, with
    its offset)."""
    level = np.exp(-(mu**2) / 2)
    return _integral(lambda u: np.exp(-(mu**2) * np.square(1 - np.exp(-u)) / 2) - level, np.inf)


def erf_ratio(v: np.ndarray, delta: Numbers) -> np.ndarray:
    """erf(|v_l| / sqrt 2) / |delta_l| of each token, equal for all along `exp_growth`, [M]."""
    return erf(_lengths(v) / np.sqrt(2)) / _lengths(delta)


def _lengths(delta: Numbers) -> np.ndarray:
    array = finite_array("delta", delta)
    return np.abs(array) if array.ndim == 1 else np.linalg.norm(array, axis=-1)


def _along(delta: Numbers, lengths: np.ndarray) -> np.ndarray:
    array, own = finite_array("delta", delta), _lengths(delta)
    with np.errstate(invalid="ignore"):
        share = np.where(own > 0, lengths / np.where(own > 0, own, 1), 0.0)
    return array * (share if array.ndim == 1 else share[:, None])


def _integral(function, end: float) -> float:
    return quad(function, 0.0, end, epsabs=1e-13, epsrel=1e-12, limit=500)[0]
