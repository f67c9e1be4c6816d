"""A bracket around R_rho from any potentials, however they were found.

Lower end: for any (alpha, beta) with zeta = sum a alpha - sum b beta > 0 the best point of the
dual on their ray gives zeta / Psi^(1/s) <= R_rho, with Psi = sum a_i b_j (gap_ij / c_ij)^s. Upper
end: the plan of the potentials, rounded to a coupling, has a cost that the least one cannot
exceed. Both hold for every input up to rounding (specification, section 2; the scale-free bound
is ours).
"""

from typing import Any

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinfer.theory.transport.blocked import add_up
from jaxinfer.theory.transport.problem import RRhoProblem
from jaxinfer.theory.transport.solver import (
    Potentials,
    Rows,
    error_of,
    log_cost,
    mirrored,
    rows_of,
)
from jaxinfer.typing import Leaf


@flax.struct.dataclass
class Bracket:
    """lower <= R_rho <= upper, in the problem's unit."""

    lower: Leaf  # f[]
    upper: Leaf  # f[]
    product: Leaf  # f[], the cost of the product coupling, above which R_rho cannot be

    @property
    def relative_gap(self) -> Array:
        """(upper - lower) / upper."""
        return (self.upper - self.lower) / jnp.maximum(self.upper, jnp.finfo(self.upper.dtype).tiny)


def penalty_rows(problem: RRhoProblem, rows: Rows) -> Float[Array, " N"]:
    """psi_i = sum_j b_j (gap_ij / c_ij)^s of every row, from a pass that has been made."""
    return jnp.exp(rows.log_ratio - problem.log_k) * rows.gap


def zeta(problem: RRhoProblem, potentials: Potentials) -> Float[Array, ""]:
    """sum_i a_i alpha_i - sum_j b_j beta_j."""
    a, b = jnp.exp(problem.log_a), jnp.exp(problem.log_b)
    return (a * potentials.alpha).sum() - (b * potentials.beta).sum()


def lower_bound(problem: RRhoProblem, potentials: Potentials, rows: Rows) -> Float[Array, ""]:
    """The scale-free dual bound; 0 where the potentials say nothing."""
    psi = (jnp.exp(problem.log_a) * penalty_rows(problem, rows)).sum()
    value = zeta(problem, potentials)
    sound = (value > 0) & (psi > 0)
    return jnp.where(sound, value * jnp.where(sound, psi, 1) ** (-1 / problem.s), 0)


def certify(problem: RRhoProblem, potentials: Potentials, rows: Rows | None = None) -> Bracket:
    """The bracket of potentials: four passes over all pairs, three where `rows` is there.

    The plan's rows and then its columns are scaled down to the weights where they ship too much;
    what is then missing is shipped by the product of both remainders.
    """
    rows = rows_of(problem, potentials) if rows is None else rows
    swapped, turned = problem.swapped, mirrored(potentials)
    lower = lower_bound(problem, potentials, rows)
    log_rows = -jnp.maximum(rows.log_ratio, 0)
    columns = rows_of(swapped, turned, problem.log_a + log_rows).log_ratio
    log_columns = -jnp.maximum(columns, 0)
    kept = rows_of(problem, potentials, problem.log_b + log_columns).log_ratio
    # Rounding may leave a tiny negative remainder, which has no fractional power.
    missing_rows = jnp.maximum(-jnp.expm1(log_rows + kept), 0)
    missing_columns = jnp.maximum(-jnp.expm1(log_columns + columns), 0)
    a = jnp.exp(problem.log_a)
    missing = jnp.maximum((a * missing_rows).sum(), jnp.finfo(a.dtype).tiny)
    upper, product = _costs(
        problem,
        (problem.x, potentials.alpha, problem.log_a, log_rows, missing_rows / missing),
        (problem.y, potentials.beta, problem.log_b, log_columns, missing_columns),
    )
    return Bracket(lower, jnp.minimum(upper, product), product)


def marginal_error(problem: RRhoProblem, potentials: Potentials, rows: Rows) -> Float[Array, ""]:
    """The L1 distance of the plan's row sums and column sums from the weights, added: one pass."""
    swapped = problem.swapped
    columns = rows_of(swapped, mirrored(potentials))
    return error_of(problem.log_a, rows) + error_of(problem.log_b, columns)


def _costs(problem: RRhoProblem, rows: Any, columns: Any) -> tuple[Array, Array]:
    """R_rho's objective at the rounded plan, and at the product coupling."""

    def term(row, column):
        (x, alpha, log_a, log_row, more_row), (y, beta, log_b, log_column, more_column) = (
            row,
            column,
        )
        log_c = log_cost(problem, x, y)
        gap = alpha[:, None] - beta
        # gamma_ij c_ij / (a_i b_j), in logarithms until all factors are together
        log_kept = log_row[:, None] + log_column + problem.log_k - (problem.s - 1) * log_c
        log_kept += (problem.s - 1) * jnp.log(jnp.where(gap > 0, gap, 1))
        there = (gap > 0) & (log_a > -jnp.inf)[:, None] & (log_b > -jnp.inf)
        kept = jnp.exp(jnp.where(there, log_kept, -jnp.inf))
        shipped = kept + more_row[:, None] * more_column * jnp.exp(log_c)
        weight = jnp.exp(log_a[:, None] + log_b)
        return jnp.stack([weight * shipped**problem.rho, weight * jnp.exp(problem.rho * log_c)], 1)

    upper, product = add_up(term, rows, columns).sum(axis=0) ** (1 / problem.rho)
    return upper, product
