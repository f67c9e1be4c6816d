"""Filters as ratios of polynomials in 1/z, trained as Rational Transfer Functions are (arXiv
2405.06147): from zero, by the response that an FFT of numerator and denominator gives.

What circles back at the FFT's end is not in the filter, so of the result only the denominator is
kept: its roots are the poles, and residues are solved. In float32 the coefficients lose the poles
beyond 8 of them.

Axis letters: F filters, K modes, N samples, C coefficients = 2 K.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float64

from jaxinfer.distill.filters.baselines import modes_of_denominator
from jaxinfer.distill.filters.modes import Modes

MOST_MODES = 4
STEPS, RATE = 5000, 1e-2


class _Ratio(NamedTuple):
    numerator: Array  # [F, C]
    denominator: Array  # [F, C], behind a leading 1


def rational(g: Float64[np.ndarray, "F N"], count: int, steps: int = STEPS) -> list[Modes]:
    """At most `count` modes of each filter."""
    norm = np.linalg.norm(g, axis=1, keepdims=True)
    ratio = _trained(jnp.asarray(g / np.where(norm > 0, norm, 1), jnp.float32), 2 * count, steps)
    denominators = np.pad(np.asarray(ratio.denominator, np.float64), ((0, 0), (1, 0)))
    denominators[:, 0] = 1
    return [
        modes_of_denominator(row, target, count)
        for row, target in zip(denominators, g, strict=True)
    ]


@functools.partial(jax.jit, static_argnames=("coefficients", "steps"))
def _trained(target: Array, coefficients: int, steps: int) -> _Ratio:
    samples = target.shape[1]
    size = 2 << samples.bit_length()
    transform = optax.adam(optax.cosine_decay_schedule(RATE, steps))

    def loss(ratio: _Ratio) -> Array:
        denominator = jnp.pad(ratio.denominator, ((0, 0), (1, 0)), constant_values=1)
        above, below = jnp.fft.rfft(ratio.numerator, size), jnp.fft.rfft(denominator, size)
        return jnp.square(jnp.fft.irfft(above / below, size)[:, :samples] - target).sum()

    def step(_, state):
        ratio, opt_state = state
        updates, opt_state = transform.update(jax.grad(loss)(ratio), opt_state)
        return optax.apply_updates(ratio, updates), opt_state

    start = _Ratio(*(jnp.zeros((len(target), coefficients)) for _ in range(2)))
    return jax.lax.fori_loop(0, steps, step, (start, transform.init(start)))[0]
