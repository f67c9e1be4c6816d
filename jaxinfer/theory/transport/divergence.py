"""What to report of R_rho: per point for pairs, debiased with a p-value for samples.

The raw value of two samples hardly shrinks with their size in many dimensions, and for pairs it
grows like n^(1/s) (specification, section 8; ours).
"""

import contextlib
import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxinfer.arguments import whole
from jaxinfer.runtime.program import Program
from jaxinfer.theory.transport.certified import r_rho
from jaxinfer.theory.transport.gradients import distance
from jaxinfer.theory.transport.problem import (
    check_rho,
    default_lift,
    distribution,
)

ROUGH = 1e-2  # a bracket; its lower end is an order closer
PERMUTATIONS = 200


@dataclass(frozen=True)
class Debiased:
    """Two samples compared, in the units of the points."""

    value: float
    """R(x, y) - (R(x, x') + R(y, y')) / 2 of independent halves, as many points in each as half of
    the smaller sample: about 0 for one law."""
    p_value: float
    """Share of reshuffles of the pooled points whose value is as large, the given one included."""
    between: float
    within: tuple[float, float]
    permutations: int


def debiased(
    x: object,
    y: object,
    rho: float = 1.1,
    *,
    permutations: int = PERMUTATIONS,
    dimensions: int | None = None,
    seed: int = 0,
) -> Debiased:
    """Whether two samples are of one law, by R_rho and a permutation test.

    Args:
      x, y: points [n, d] and [m, d], at least 4 each, in any order that is not of their values.
      permutations: reshuffles of the pooled points; 200 at least for a p-value of 0.005.
      dimensions: principal components of the pooled points to compare in; 16 to 32 are enough where
        there are hundreds (table 6).
      seed: of the halves and the reshuffles.

    Raises:
      ValueError: what `r_rho` refuses, or too few points.
    """
    rho = check_rho(rho)
    one, other = distribution("x", x, "a", None), distribution("y", y, "b", None)
    samples = [z.points[z.place] for z in (one, other)]
    if min(map(len, samples)) < 4 or samples[0].shape[1] != samples[1].shape[1]:
        shapes = [list(z.shape) for z in samples]
        raise ValueError(
            f"x and y must be at least 4 points each, of equally many dimensions, got {shapes}"
        )
    count = whole("permutations", permutations, 1)
    rng = np.random.default_rng(whole("seed", seed, 0))
    pool = np.concatenate(samples)
    if dimensions is not None:
        pool = _principal(pool, whole("dimensions", dimensions))
    n, kind = len(samples[0]), pool.dtype
    given = np.concatenate([rng.permutation(n), n + rng.permutation(len(samples[1]))])
    orders = np.stack([given, *(rng.permutation(len(pool)) for _ in range(count))])
    lift = _lift(pool)
    with jax.enable_x64(True) if kind == np.float64 else contextlib.nullcontext():
        found = np.asarray(
            _statistics(rho, lift, n, jnp.asarray(pool), jnp.asarray(orders, jnp.int32))
        )
    between, within_x, within_y = found[0]
    values = found[:, 0] - found[:, 1:].mean(axis=1)
    p_value = float((values >= values[0]).mean())
    within = float(within_x), float(within_y)
    return Debiased(float(values[0]), p_value, float(between), within, count)


@functools.partial(Program, static_argnames=("rho", "lift", "n"))
def _statistics(
    rho: float, lift: float, n: int, pool: Float[Array, "N D"], orders: Int[Array, "P N"]
) -> Float[Array, "P 3"]:
    """R between halves of x and y, within x and within y, for every order of the pool."""
    half = min(n, pool.shape[0] - n) // 2
    x, x_rest, y, y_rest = (
        pool[orders[:, start : start + half]] for start in (0, half, n, n + half)
    )
    pairs = jnp.stack([x, x, y], axis=1), jnp.stack([y, x_rest, y_rest], axis=1)

    def of(pair: tuple[Array, Array]) -> Float[Array, ""]:
        return distance(*pair, rho=rho, tol=ROUGH, lift=lift)

    flat = [z.reshape(-1, half, pool.shape[1]) for z in pairs]
    return lax.map(of, tuple(flat)).reshape(-1, 3)


@dataclass(frozen=True)
class Paired:
    """Points and their changed copies, in the units of the points."""

    value: float
    """R / n^(1/s): an error per point, which does not grow with n as R does."""
    identity: float
    """(mean ||x_i - y_i||^rho)^(1/rho), what the coupling of the pairs costs per point."""
    mean_distance: float
    """mean ||x_i - y_i||, at least the earth mover's distance."""
    saturation: float
    gap: float
    """Relative width of the bracket around `value`."""

    @property
    def permuted(self) -> float:
        """identity / value: above 1, errors exchange points more than they move them."""
        return self.identity / self.value if self.value else 1.0


def paired(x: object, y: object, rho: float = 1.1, *, tol: float = 1e-3) -> Paired:
    """The error of y_i for x_i, as R_rho of two uniform clouds of n points sees it.

    Where the errors are small against the distances between points, `value` is `identity` (table
    4).

    Raises:
      ValueError: what `r_rho` refuses, or clouds of unequal size.
    """
    one, other = distribution("x", x, "a", None), distribution("y", y, "b", None)
    points, copies = (z.points[z.place].astype(np.float64) for z in (one, other))
    if points.shape != copies.shape:
        raise ValueError(
            "x and y must be equally many points of equally many dimensions, got "
            f"{list(points.shape)} and {list(copies.shape)}"
        )
    found = r_rho(x, y, rho=rho, tol=tol)
    share = len(points) ** ((rho - 1) / rho)
    errors = np.linalg.norm(points - copies, axis=1)
    return Paired(
        value=found.value / share,
        identity=float((errors**rho).mean() ** (1 / rho)),
        mean_distance=float(errors.mean()),
        saturation=found.saturation,
        gap=(found.upper - found.lower) / found.upper if found.upper else 0.0,
    )


def _principal(pool: np.ndarray, dimensions: int) -> np.ndarray:
    centred = pool - pool.mean(axis=0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    return (centred @ axes[:dimensions].T).astype(pool.dtype)


def _lift(pool: np.ndarray) -> float:
    """What a pool with repeated points needs, since halves of it may share them."""
    distinct = distribution("x", pool, "a", None)
    return 0.0 if len(distinct.points) == len(pool) else default_lift(distinct, distinct)
