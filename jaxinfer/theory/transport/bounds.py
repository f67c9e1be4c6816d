"""Bounds of R_rho that one pass over all pairs gives (specification, section 1.2; ours).

With K_ij = c_ij^-s, kappa_i = sum_j b_j K_ij and kappa'_j = sum_i a_i K_ij (kernel densities):

    CONST = (sum_ij a_i b_j K_ij)^(-1/s)          one gap for all pairs
    ROW   = (sum_i a_i kappa_i^(1-rho))^(1/rho)   without the constraints of the columns
    COL   = (sum_j b_j kappa'_j^(1-rho))^(1/rho)  without those of the rows
    PROD  = (sum_ij a_i b_j c_ij^rho)^(1/rho)     the product coupling

and CONST <= ROW, COL <= R_rho <= PROD. All are exact up to rounding.
"""

import flax.struct
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float

from jaxinfer.theory.transport.blocked import weigh
from jaxinfer.theory.transport.problem import RRhoProblem
from jaxinfer.theory.transport.solver import Potentials, log_cost, mirrored
from jaxinfer.typing import Leaf


@flax.struct.dataclass
class Bounds:
    """In the problem's unit."""

    const: Leaf  # f[]
    row: Leaf  # f[]
    column: Leaf  # f[]
    product: Leaf  # f[]
    potentials: Leaf  # `Potentials`, whose dual bound is the larger of `row` and `column`

    @property
    def lower(self) -> Array:
        """The best lower bound."""
        return jnp.maximum(self.row, self.column)


def one_pass_bounds(problem: RRhoProblem) -> Bounds:
    """All four, from a pass over the rows and one over the columns."""
    s, rho = problem.s, problem.rho
    densities = [log_density(one) for one in (problem, problem.swapped)]
    weights = problem.log_a, problem.log_b
    const = jnp.exp(-logsumexp(problem.log_a + densities[0]) / s)
    row, column = (
        jnp.exp(logsumexp(log_w + (1 - rho) * log_density) / rho)
        for log_w, log_density in zip(weights, densities, strict=True)
    )
    # With beta = 0 the row equations have the solution alpha_i = (k kappa_i)^(-1/p).
    alpha, turned = (jnp.exp(-(problem.log_k + one) / (s - 1)) for one in densities)
    by_row = Potentials(alpha, jnp.zeros_like(turned))
    by_column = mirrored(Potentials(turned, jnp.zeros_like(alpha)))
    best = Potentials(
        jnp.where(row >= column, by_row.alpha, by_column.alpha),
        jnp.where(row >= column, by_row.beta, by_column.beta),
    )
    return Bounds(const, row, column, product_cost(problem), best)


def log_density(problem: RRhoProblem) -> Float[Array, " N"]:
    """log kappa_i of every row."""
    return _log_power_sum(problem, -problem.s)


def product_cost(problem: RRhoProblem) -> Float[Array, ""]:
    """PROD: what the product coupling costs."""
    return jnp.exp(logsumexp(problem.log_a + _log_power_sum(problem, problem.rho)) / problem.rho)


def _log_power_sum(problem: RRhoProblem, power: Array) -> Float[Array, " N"]:
    """log sum_j b_j c_ij^power of every row."""

    def term(x, column):
        y, log_b = column
        log_w = log_b + power * log_cost(problem, x, y)
        return jnp.where(log_b > -jnp.inf, log_w, -jnp.inf), ()

    return weigh(term, problem.x, (problem.y, problem.log_b)).log_total
