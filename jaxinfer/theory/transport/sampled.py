"""R_rho from a share of the pairs, for clouds that no machine passes over in full.

The solver's sweeps with estimated rows: noise of log f enters a step divided by p, samples are
drawn anew in every sweep, and the potentials of the last half are averaged. The bracket is
certified by full passes where the pairs allow it; beyond, it is an interval from independent
samples (specification, section 6; approximate, ours).
"""

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxinfer.arguments import whole
from jaxinfer.runtime.program import Program
from jaxinfer.theory.transport.certify import Bracket, certify, marginal_error, penalty_rows, zeta
from jaxinfer.theory.transport.estimates import Sampling, estimated_rows, nearest_leaves
from jaxinfer.theory.transport.leaves import Leaves, leaves_of
from jaxinfer.theory.transport.problem import RRhoProblem
from jaxinfer.theory.transport.solve import Solution
from jaxinfer.theory.transport.solver import (
    Potentials,
    Rows,
    error_of,
    mirrored,
    newton_step,
    rows_of,
)

CERTIFIED_PAIRS = 4 * 10**8
PAIRS = 256
"""Pairs of a row: half in near leaves, half drawn."""
SWEEPS = 15
"""At rho 1.25 and 4,096 points of 20 clusters they leave a gap of 4.6e-3, 6 of 7.1e-3."""
LARGEST_CHANGE = 0.5
PRODUCT_PAIRS = 65536
REPEATS, QUANTILE = 8, 3.5  # Student's t of 7 degrees of freedom at 99 %, two-sided


def solve_sampled(
    problem: RRhoProblem,
    tol: float,
    most: int,
    seed: int,
    *,
    pairs: int = PAIRS,
    certified_pairs: int = CERTIFIED_PAIRS,
) -> tuple[Solution, bool]:
    """Averaged potentials and their bracket, and whether that bracket is certain.

    Args:
      most: sweeps at most; `SWEEPS` / (rho - 1) are enough, where noise and not distance from the
        optimum is what is left.
      pairs: evaluated for each row in every sweep.
      certified_pairs: above so many, the bracket is an interval at about 99 %.
    """
    rho = float(problem.rho)
    if rho > 2:
        raise ValueError(f"method 'sampled' takes rho up to 2, got {rho:g}; use 'alternating'")
    whole("pairs", pairs, 2)
    rows, columns = (leaves_of(np.asarray(z)) for z in (problem.x, problem.y))
    ordered = in_leaves(problem, rows, columns)
    samplings = samplings_of(ordered, rows, columns, pairs)
    sweeps = min(most, math.ceil(min(max(SWEEPS / (rho - 1), 12), 200)))
    for_sweeps, for_interval = jax.random.split(jax.random.key(seed))
    averaged = _sweeps(ordered, samplings, for_sweeps, jnp.asarray(sweeps, jnp.int32))
    exact = problem.x.shape[0] * problem.y.shape[0] <= certified_pairs
    back = rows.back(np.asarray(averaged.alpha)), columns.back(np.asarray(averaged.beta))
    potentials = Potentials(*map(jnp.asarray, back))
    if exact:
        bracket, error = _certified(problem, potentials)
    else:
        bracket, error = _interval(ordered, averaged, samplings, for_interval)
    converged = bracket.relative_gap <= tol
    return Solution(potentials, bracket, error, jnp.asarray(sweeps), converged), exact


def in_leaves(problem: RRhoProblem, x: Leaves, y: Leaves) -> RRhoProblem:
    """The problem with its atoms in the order of the leaves; repeated ones weigh nothing."""
    return replace(
        problem,
        x=problem.x[x.order],
        y=problem.y[y.order],
        log_a=jnp.where(x.real, problem.log_a[x.order], -jnp.inf),
        log_b=jnp.where(y.real, problem.log_b[y.order], -jnp.inf),
    )


def samplings_of(
    ordered: RRhoProblem, x: Leaves, y: Leaves, pairs: int
) -> tuple[Sampling, Sampling]:
    """How the rows look at the columns, and the columns at the rows."""
    found = []
    for one, other, leaves in ((ordered.x, ordered.y, y), (ordered.y, ordered.x, x)):
        near = min(leaves.count, max(1, round(pairs / 2 / leaves.size)))
        draws = max(1, pairs - near * leaves.size) if near < leaves.count else 0
        found.append(Sampling(_nearest(one, other, leaves.count, near), leaves.size, draws))
    return found[0], found[1]


_nearest = Program(nearest_leaves, static_argnames=("leaves", "count"))


@Program
def _sweeps(
    problem: RRhoProblem,
    samplings: tuple[Sampling, Sampling],
    key: PRNGKeyArray,
    sweeps: Int[Array, ""],
) -> Potentials:
    """The average of the last half of the sweeps' potentials."""

    def step(problem: RRhoProblem, potentials: Potentials, sampling: Sampling, key, largest):
        rows = estimated_rows(problem, potentials, sampling, key)
        return newton_step(problem, potentials, rows, largest)

    def sweep(count: Array, carry: tuple[Potentials, Potentials]) -> tuple[Potentials, Potentials]:
        now, total = carry
        for_rows, for_columns = jax.random.split(jax.random.fold_in(key, count))
        # the first step, from beta = 0, is exact at any length
        largest = jnp.where(count == 0, jnp.inf, LARGEST_CHANGE).astype(problem.rho.dtype)
        now = replace(now, alpha=step(problem, now, samplings[0], for_rows, largest))
        turned = mirrored(now)
        now = replace(now, beta=-step(problem.swapped, turned, samplings[1], for_columns, largest))
        counts = (count >= sweeps // 2).astype(problem.rho.dtype)
        return now, jax.tree.map(lambda t, z: t + counts * z, total, now)

    zero = Potentials(jnp.zeros_like(problem.log_a), jnp.zeros_like(problem.log_b))
    first = replace(zero, alpha=jnp.ones_like(problem.log_a))
    _, total = lax.fori_loop(0, sweeps, sweep, (first, zero))
    return jax.tree.map(lambda t: t / (sweeps - sweeps // 2), total)


@Program
def _certified(problem: RRhoProblem, potentials: Potentials) -> tuple[Bracket, Array]:
    rows = rows_of(problem, potentials)
    return certify(problem, potentials, rows), marginal_error(problem, potentials, rows)


@Program
def _interval(
    problem: RRhoProblem,
    potentials: Potentials,
    samplings: tuple[Sampling, Sampling],
    key: PRNGKeyArray,
) -> tuple[Bracket, Float[Array, ""]]:
    """The bracket from samples that the potentials have not seen.

    As `certify` does: rows and columns are scaled down to the weights and a product ships the rest.
    Its cost is bounded through the centre, c_ij <= u_i + v_j, and Minkowski's inequality. Noise in
    the marginals makes the upper end larger, not smaller.
    """
    swapped, turned = problem.swapped, mirrored(potentials)
    a, b = jnp.exp(problem.log_a), jnp.exp(problem.log_b)
    mean = functools.partial(_mean_rows, key=key)
    rows, totals = mean(problem, potentials, samplings[0], problem.log_b, 0)
    spread = QUANTILE * totals.std(ddof=1) / math.sqrt(REPEATS)
    psi, value = totals.mean(), zeta(problem, potentials)
    columns, _ = mean(swapped, turned, samplings[1], problem.log_a, 1)
    log_columns = -jnp.maximum(columns, 0)
    log_rows = -jnp.maximum(rows, 0)
    kept, _ = mean(problem, potentials, samplings[0], problem.log_b + log_columns, 2)
    kept_columns, _ = mean(swapped, turned, samplings[1], problem.log_a + log_rows, 3)
    missing_rows = jnp.maximum(-jnp.expm1(log_rows + kept), 0)
    missing_columns = jnp.maximum(-jnp.expm1(log_columns + kept_columns), 0)
    rest = _rest(problem, (a, missing_rows), (b, missing_columns))
    product = _product_estimate(problem, key)
    upper = jnp.exp(problem.log_k) * (psi + spread) ** (1 / problem.rho) + rest
    lower = jnp.maximum(value, 0) * (psi + spread) ** (-1 / problem.s)
    error = error_of(problem.log_a, Rows(rows, rows, rows))
    error += error_of(problem.log_b, Rows(columns, columns, columns))
    return Bracket(lower, upper, product), error


def _mean_rows(
    problem: RRhoProblem,
    potentials: Potentials,
    sampling: Sampling,
    log_b: Float[Array, " M"],
    part: int,
    *,
    key: PRNGKeyArray,
) -> tuple[Float[Array, " N"], Float[Array, " T"]]:
    """log of the rows' mean ratio over the repeats, and Psi as every repeat has it."""

    def repeat(key: Array) -> tuple[Array, Array]:
        rows = estimated_rows(problem, potentials, sampling, key, log_b)
        psi = (jnp.exp(problem.log_a) * penalty_rows(problem, rows)).sum()
        return jnp.exp(rows.log_ratio), psi

    keys = jax.random.split(jax.random.fold_in(key, part), REPEATS)
    ratios, totals = lax.map(repeat, keys)
    return jnp.log(ratios.mean(axis=0)), totals


def _rest(
    problem: RRhoProblem, rows: tuple[Array, Array], columns: tuple[Array, Array]
) -> Float[Array, ""]:
    """A bound on what the product of the missing shares costs."""
    (a, e), (b, f) = rows, columns
    half = problem.lift / 2
    u, v = (jnp.sqrt(jnp.square(z).sum(axis=1)) + half for z in (problem.x, problem.y))

    def norm(weights: Array, values: Array) -> Array:
        return (weights * values**problem.rho).sum() ** (1 / problem.rho)

    missing = jnp.minimum((a * e).sum(), (b * f).sum())
    cost = norm(a, e * u) * norm(b, f) + norm(a, e) * norm(b, f * v)
    return cost / jnp.maximum(missing, jnp.finfo(cost.dtype).tiny)


def _product_estimate(problem: RRhoProblem, key: PRNGKeyArray) -> Float[Array, ""]:
    """PROD from random pairs."""
    keys = jax.random.split(jax.random.fold_in(key, REPEATS))
    sides = ((problem.x, problem.log_a), (problem.y, problem.log_b))
    x, y = (
        jax.random.choice(key, z, (PRODUCT_PAIRS,), p=jnp.exp(log_w))
        for key, (z, log_w) in zip(keys, sides, strict=True)
    )
    squared = jnp.square(x - y).sum(axis=1) + jnp.square(problem.lift)
    return (squared ** (problem.rho / 2)).mean() ** (1 / problem.rho)
