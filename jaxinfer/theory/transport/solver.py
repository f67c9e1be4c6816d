"""Exact potentials of R_rho: alternating norm-Newton steps.

The dual of R_rho^rho (arXiv 2307.10042, Lemma 6) is concave and smooth, and its block maximum over
one alpha_i solves f_i(alpha_i) = 1 with

    f_i(t) = k sum_j b_j (t - beta_j)_+^p / c_ij^s,    p = s - 1,

the mass that row i of the plan ships over the mass that it has. f_i^(1/p) is an L^p norm of a
positive part, so convex and nearly linear in t: one Newton step on it is almost exact, from either
side. A sweep steps all alpha, then all beta, as Sinkhorn's algorithm does. The method is ours; the
paper's own loop is in `sign_ascent`.
"""

from dataclasses import replace
from typing import NamedTuple

import flax.struct
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxinfer.theory.transport.blocked import squared_distances, weigh
from jaxinfer.theory.transport.problem import RRhoProblem
from jaxinfer.typing import Leaf

MOST_INNER = 80
"""Passes for one bracketed step; half of them are bisections."""


@flax.struct.dataclass
class Potentials:
    """Dual variables in the convention of the paper: f = alpha and g = -beta in that of optimal
    transport libraries. Their unit is that of the cost to the power rho."""

    alpha: Leaf  # f[N]
    beta: Leaf  # f[M]


class Rows(NamedTuple):
    """Of the plan gamma_ij = k a_i b_j gap_ij^p / c_ij^s, gap_ij = (alpha_i - beta_j)_+."""

    log_ratio: Float[Array, " N"]
    """log of what row i ships over what it has, log eta_i."""
    inverse_gap: Float[Array, " N"]
    """Mean of 1 / gap_ij with the plan's weights."""
    gap: Float[Array, " N"]
    """Mean of gap_ij with the plan's weights."""


def log_cost(problem: RRhoProblem, x: Float[Array, "R D"], y: Float[Array, "C D"]) -> Array:
    """log c_ij of a tile; coincident atoms without lift are at a tiny distance, not at none."""
    squared = squared_distances(x, y) + jnp.square(problem.lift)
    return jnp.log(jnp.maximum(squared, jnp.finfo(x.dtype).tiny)) / 2


def rows_of(problem: RRhoProblem, potentials: Potentials, log_b: Array | None = None) -> Rows:
    """One pass over all pairs; `log_b` replaces the weights of the columns."""

    def term(row, column):
        (x, alpha), (y, beta, log_b) = row, column
        gap = alpha[:, None] - beta
        safe = jnp.where(gap > 0, gap, 1)
        log_w = log_b + (problem.s - 1) * jnp.log(safe) - problem.s * log_cost(problem, x, y)
        return jnp.where((gap > 0) & (log_b > -jnp.inf), log_w, -jnp.inf), (1 / safe, safe)

    weights = problem.log_b if log_b is None else log_b
    rows, columns = (problem.x, potentials.alpha), (problem.y, potentials.beta, weights)
    found = weigh(term, rows, columns)
    return Rows(found.log_total + problem.log_k, *found.means)


def mirrored(potentials: Potentials) -> Potentials:
    """The potentials of `problem.swapped`."""
    return Potentials(-potentials.beta, -potentials.alpha)


def newton_step(
    problem: RRhoProblem,
    potentials: Potentials,
    rows: Rows,
    largest: float | Float[Array, ""] = jnp.inf,
) -> Float[Array, " N"]:
    """alpha after one Newton step on f^(1/p) = 1, of at most `largest` mean gaps.

    A row that ships nothing has no slope; it starts again above every beta, where all columns
    take part.
    """
    alpha, beta = potentials.alpha, potentials.beta
    dead = rows.log_ratio == -jnp.inf
    log_ratio = jnp.where(dead, 0, rows.log_ratio)
    slope = jnp.where(dead, 1, rows.inverse_gap)
    change = jnp.clip(1 - jnp.exp(-log_ratio / (problem.s - 1)), -largest, largest)
    stepped = alpha - change / slope
    return jnp.where(dead, beta.max() + (alpha.max() - beta.min()) + 1e-3, stepped)


def error_of(log_a: Float[Array, " N"], rows: Rows) -> Float[Array, ""]:
    """sum_i a_i |1 - eta_i|: the L1 distance of the plan's row sums from the weights."""
    return (jnp.exp(log_a) * jnp.abs(jnp.expm1(rows.log_ratio))).sum()


@flax.struct.dataclass
class State:
    """Where the iteration stands: potentials, and the pass over all pairs that they have had."""

    potentials: Potentials
    rows: Rows
    sweeps: Leaf  # i[]
    marginal_error: Leaf  # f[]; the columns, which were stepped last, are met far better


def start(problem: RRhoProblem) -> State:
    """beta = 0, from where the first step of alpha is exact."""
    alpha, beta = jnp.ones_like(problem.log_a), jnp.zeros_like(problem.log_b)
    return _met(problem, Potentials(alpha, beta), jnp.zeros((), jnp.int32))


def sweep(problem: RRhoProblem, state: State) -> State:
    """Steps of all alpha, then of all beta: two passes over all pairs where rho is at most 2."""
    potentials = state.potentials
    potentials = replace(potentials, alpha=step(problem, potentials, state.rows))
    turned, swapped = mirrored(potentials), problem.swapped
    beta = -step(swapped, turned, rows_of(swapped, turned))
    return _met(problem, replace(potentials, beta=beta), state.sweeps + 1)


def step(problem: RRhoProblem, potentials: Potentials, rows: Rows) -> Float[Array, " N"]:
    """The alpha that fit beta: nearly, by one Newton step, or for rho above 2 by bracketed ones.

    There p is below 1, f^(1/p) no longer convex, and its slope infinite above every beta_j.
    """
    steps = bracketed_steps if problem.bracketed else newton_step
    return steps(problem, potentials, rows)


def bracketed_steps(problem: RRhoProblem, potentials: Potentials, rows: Rows) -> Array:
    """alpha with f = 1 by Newton steps and bisections in turn, inside brackets that close."""
    beta, eps = potentials.beta, 8 * jnp.finfo(problem.rho.dtype).eps

    def goes_on(carry):
        count, _, low, high, rows = carry
        is_wide = (high == jnp.inf) | (high - low > eps * jnp.abs(high))
        is_open = is_wide & (jnp.abs(rows.log_ratio) > eps)
        return (count < MOST_INNER) & is_open.any()

    def closer(carry):
        count, alpha, low, high, rows = carry
        low = jnp.where(rows.log_ratio < 0, alpha, low)
        high = jnp.where(rows.log_ratio >= 0, alpha, high)
        wider = beta.min() + 2 * (alpha - beta.min())
        middle = jnp.where(high < jnp.inf, (low + high) / 2, wider)
        newton = newton_step(problem, Potentials(alpha, beta), rows)
        fits = (count % 2 == 0) & (newton > low) & (newton < high)
        alpha = jnp.where(fits, newton, middle)
        return count + 1, alpha, low, high, rows_of(problem, Potentials(alpha, beta))

    low = jnp.full_like(potentials.alpha, beta.min())
    carry = (jnp.zeros((), jnp.int32), potentials.alpha, low, jnp.full_like(low, jnp.inf), rows)
    return lax.while_loop(goes_on, closer, carry)[1]


def alternate(
    problem: RRhoProblem,
    state: State,
    error: float | Float[Array, ""],
    most: int | Int[Array, ""],
) -> State:
    """Sweeps until the marginals are met within `error`, or until `most` sweeps are done."""

    def goes_on(state: State) -> Bool[Array, ""]:
        return (state.marginal_error > error) & (state.sweeps < most)

    return lax.while_loop(goes_on, lambda state: sweep(problem, state), state)


def _met(problem: RRhoProblem, potentials: Potentials, sweeps: Array) -> State:
    rows = rows_of(problem, potentials)
    return State(potentials, rows, sweeps, error_of(problem.log_a, rows))
