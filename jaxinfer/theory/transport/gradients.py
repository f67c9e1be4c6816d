"""R_rho as a function to differentiate, compile and batch.

By the envelope theorem the derivative of R_rho is that of its dual bound zeta / Psi^(1/s) with the
potentials held: two passes over all pairs, whatever the number of sweeps was, and nothing of the
iterations is kept (specification, section 2; ours).
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinfer.theory.transport.blocked import weigh
from jaxinfer.theory.transport.certify import penalty_rows, zeta
from jaxinfer.theory.transport.problem import RRhoProblem, problem_of
from jaxinfer.theory.transport.solve import Solution, solve
from jaxinfer.theory.transport.solver import Potentials, log_cost, mirrored, rows_of

MOST_SWEEPS = 2000


def distance(
    x: Float[Array, "N D"],
    y: Float[Array, "M D"],
    a: Float[Array, " N"] | None = None,
    b: Float[Array, " M"] | None = None,
    *,
    rho: float = 1.1,
    tol: float = 1e-3,
    lift: float = 0.0,
    most_sweeps: int = MOST_SWEEPS,
) -> Float[Array, ""]:
    """R_rho's certified lower end, for use under `jax.grad`, `jax.jit` and `jax.vmap`.

    Nothing is checked and no equal atoms are merged, as the arrays may be traced; `r_rho` does
    both. Supports that share a point need a `lift`, in the units of the points.

    Args:
      x, y: points, of one dtype, which is the dtype of the result.
      a, b: weights that add up to 1; uniform where left out. Their derivative is defined up to a
        constant, as the weights stay on the simplex.
      rho: above 1, a constant of the compilation.
      tol: relative width of the bracket at which the sweeps end.
    """
    a = jnp.full(x.shape[0], 1 / x.shape[0], x.dtype) if a is None else a
    b = jnp.full(y.shape[0], 1 / y.shape[0], y.dtype) if b is None else b
    return _distance(rho, tol, lift, most_sweeps, x, y, a, b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _distance(rho, tol, lift, most, x, y, a, b):
    return _forward(rho, tol, lift, most, x, y, a, b)[0]


def _forward(rho, tol, lift, most, x, y, a, b):
    problem, unit = problem_of(x, y, a, b, rho, lift, bracketed=rho > 2)
    found: Solution = solve(problem, tol, most)
    value = found.bracket.lower
    return value * unit, (problem, found.potentials, value, unit)


def _backward(rho, tol, lift, most, kept, cotangent):
    problem, potentials, value, unit = kept
    by_x, by_a = _half(problem, potentials, value)
    by_y, by_b = _half(problem.swapped, mirrored(potentials), value)
    weight = cotangent * unit
    return cotangent * by_x, cotangent * by_y, weight * by_a, weight * by_b


_distance.defvjp(_forward, _backward)


def _half(
    problem: RRhoProblem, potentials: Potentials, value: Float[Array, ""]
) -> tuple[Float[Array, "N D"], Float[Array, " N"]]:
    """Derivatives of the bound by the points and weights of the rows.

    With w_ij = a_i b_j (gap_ij / c_ij)^s, which add up to Psi:
    dR/dx_i = R / Psi sum_j w_ij (x_i - y_j) / c_ij^2 and
    dR/da_i = R (alpha_i / zeta - psi_i / (s Psi)).
    Where R is 0 it has no derivative; 0 is given.
    """

    def term(row, column):
        (x, alpha), (y, beta, log_b) = row, column
        gap = alpha[:, None] - beta
        log_w = log_b + problem.s * jnp.log(jnp.where(gap > 0, gap, 1))
        log_w -= (problem.s + 2) * log_cost(problem, x, y)
        return jnp.where((gap > 0) & (log_b > -jnp.inf), log_w, -jnp.inf), ()

    a = jnp.exp(problem.log_a)
    psi = penalty_rows(problem, rows_of(problem, potentials))
    total = (a * psi).sum()
    sound = (value > 0) & (total > 0)
    total = jnp.where(sound, total, 1)
    columns = (problem.y, potentials.beta, problem.log_b)
    pull = weigh(term, (problem.x, potentials.alpha), columns, problem.y)
    strength = jnp.exp(jnp.where(sound, problem.log_a + pull.log_total - jnp.log(total), -jnp.inf))
    by_points = value * strength[:, None] * (problem.x - pull.mean_values)
    shares = potentials.alpha / jnp.where(sound, zeta(problem, potentials), 1)
    by_weights = value * (shares - psi / (problem.s * total))
    return by_points, jnp.where(sound, by_weights, 0)
