"""Instances of r_rho_transport.md with their values; one compiled program for all small ones."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.runtime.program import Program
from jaxinfer.theory.transport.problem import RRhoProblem, problem_of
from jaxinfer.theory.transport.solve import Solution, solve

RHOS = (1.05, 1.1, 1.25, 1.5, 2.0)
SHAPES = ((4, 5, 2), (6, 6, 3), (8, 5, 2), (10, 12, 4), (20, 20, 8))  # n, m, d of seeds 0 to 4
EMD = (1.0848948482, 1.7430386953, 1.3650435624, 2.4241340757, 3.3081865427)
REFERENCE = (
    (1.1293849519, 1.1602368816, 1.2160962558, 1.2739936026, 1.3596808364),
    (1.8473491379, 1.9288281737, 2.0710414153, 2.1736432269, 2.2703829649),
    (1.4322711799, 1.4787977155, 1.5644451479, 1.6512564830, 1.7751796515),
    (2.5934161042, 2.7105437415, 2.9009468580, 3.0327142941, 3.1528115710),
    (3.6198845391, 3.7931771211, 3.9994834118, 4.1055632079, 4.1838480204),
)
"""Section 7: by seed, then rho; a power-cone solver's primal and a dual agree on all to 1e-10."""


class Instance(NamedTuple):
    x: np.ndarray
    y: np.ndarray
    a: np.ndarray
    b: np.ndarray

    def cost(self) -> np.ndarray:
        return np.linalg.norm(self.x[:, None] - self.y, axis=2)


def drawn(rng: np.random.Generator, n: int, m: int, d: int) -> Instance:
    x, y = rng.normal(size=(n, d)), rng.normal(size=(m, d)) + 0.5
    a, b = rng.random(n) + 0.1, rng.random(m) + 0.1
    return Instance(x, y, a / a.sum(), b / b.sum())


def small(seed: int) -> Instance:
    """Section 7."""
    return drawn(np.random.default_rng(seed), *SHAPES[seed])


def g200() -> Instance:
    """Table 1."""
    return drawn(np.random.default_rng(42), 200, 200, 8)


def m256() -> Instance:
    """Table 2: 20 clusters."""
    rng, n, d = np.random.default_rng(1), 256, 16
    centres = rng.normal(size=(20, d)) * 3
    x = centres[rng.integers(0, 20, n)] + rng.normal(size=(n, d)) * 0.7
    y = centres[rng.integers(0, 20, n)] + rng.normal(size=(n, d)) * 0.7 + 0.3
    return Instance(x, y, np.full(n, 1 / n), np.full(n, 1 / n))


def uniform(x: np.ndarray, y: np.ndarray) -> Instance:
    x, y = np.asarray(x, float), np.asarray(y, float)
    return Instance(x, y, np.full(len(x), 1 / len(x)), np.full(len(y), 1 / len(y)))


def padded(one: Instance, size: int, dimensions: int) -> Instance:
    """With more dimensions of 0 and atoms without weight, which change no distance."""

    def wider(points: np.ndarray) -> np.ndarray:
        short = size - len(points), dimensions - points.shape[1]
        return np.pad(points, ((0, short[0]), (0, short[1])))

    def longer(weights: np.ndarray) -> np.ndarray:
        return np.pad(weights, (0, size - len(weights)))

    return Instance(wider(one.x), wider(one.y), longer(one.a), longer(one.b))


BATCH, SIZE, DIMENSIONS = 20, 20, 8


def axes(bracketed: bool) -> RRhoProblem:
    """Which leaves of a problem have a batch axis."""
    return RRhoProblem(x=0, y=0, log_a=0, log_b=0, rho=None, lift=0, bracketed=bracketed)


@Program
def _batch(problem: RRhoProblem, tol, most) -> Solution:
    return jax.vmap(solve, in_axes=(axes(problem.bracketed), None, None))(problem, tol, most)


class Found(NamedTuple):
    lower: np.ndarray
    upper: np.ndarray
    solution: Solution
    unit: np.ndarray


def solved(
    instances: Sequence[Instance],
    rho: float,
    tol: float = 1e-9,
    dtype: type = np.float64,
    lifts: Sequence[float] | None = None,
) -> Found:
    """At most `BATCH` small instances as one batch, in the units of the points."""
    count = len(instances)
    assert count <= BATCH
    lifts = [0.0] * count if lifts is None else list(lifts)
    fill = BATCH - count
    rows = [padded(one, SIZE, DIMENSIONS) for one in [*instances, *[instances[0]] * fill]]
    with jax.enable_x64(dtype == np.float64):
        arrays = [jnp.asarray(np.stack(z).astype(dtype)) for z in zip(*rows, strict=True)]
        lift = jnp.asarray(np.asarray(lifts + [lifts[0]] * fill, dtype))
        problem, unit = _problems(*arrays, jnp.asarray(rho, dtype), lift, rho > 2)
        found = _batch(problem, jnp.asarray(tol, dtype), jnp.asarray(4000, jnp.int32))
        found = jax.tree.map(lambda z: np.asarray(z)[:count], found)
        unit = np.asarray(unit)[:count]
    lower, upper = found.bracket.lower * unit, found.bracket.upper * unit
    return Found(lower, upper, found, unit)


@functools.partial(Program, static_argnames=("bracketed",))
def _problems(x, y, a, b, rho, lift, bracketed):
    return jax.vmap(
        lambda x, y, a, b, lift: problem_of(x, y, a, b, rho, lift, bracketed),
        out_axes=(axes(bracketed), 0),
    )(x, y, a, b, lift)
