"""The paper's own loop: ascent by signs (arXiv 2307.10042, Figure 1 and section 3.1).

While the rows' marginals are off by `eps` in L1, every alpha moves by one step towards its
equation; else, while the columns' are, every beta does; else it stops. Kept to reproduce the
paper and for estimates too noisy for Newton steps: the paper's constants ask for 1e9 iterations
and more, so the step is chosen, and halved where the dual would fall (ours). The print has a typo
in the sign of the beta step; beta goes down where demand is unmet.
"""

from dataclasses import replace
from typing import NamedTuple

import flax.struct
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxinfer.theory.transport.certify import Bracket, certify, marginal_error, penalty_rows, zeta
from jaxinfer.theory.transport.problem import RRhoProblem
from jaxinfer.theory.transport.solve import Solution
from jaxinfer.theory.transport.solver import (
    Potentials,
    Rows,
    error_of,
    mirrored,
    rows_of,
)
from jaxinfer.typing import Leaf

FIRST_STEP = 1e-2
SMALLEST_STEP = 1e-9
ITERATIONS = 50
"""Steps by sign that cost what one sweep of the exact solver is worth; see `solve_by_signs`."""


class Preprocessing(NamedTuple):
    """How points are lifted and light atoms dropped before the paper's loop (section 3.1)."""

    sigma: float
    """The appended coordinate over the largest distance: a `lift` of sigma r."""
    sigma_weight: float
    """Atoms lighter than this over their number are dropped."""


def preprocessing(n: int, rho: float, eps: float) -> Preprocessing:
    """Constants that keep the distance within eps r, which the printed ones do not.

    The proof of Lemma 9 gives n^(rho-1) sigma^rho / sigma_mu^(rho-1) + sigma_mu; at sigma_mu =
    eps^rho / 2 and this sigma both terms are at most half of eps^rho (ours).
    """
    half = eps**rho / 2
    return Preprocessing(sigma=half / n ** ((rho - 1) / rho), sigma_weight=half)


def preprocessing_error(n: int, rho: float, chosen: Preprocessing) -> float:
    """The bound of Lemma 9, as its proof gives it, on R_rho(mu, mu') over the largest distance."""
    lifted = n ** (rho - 1) * chosen.sigma**rho / chosen.sigma_weight ** (rho - 1)
    return (lifted + chosen.sigma_weight) ** (1 / rho)


@flax.struct.dataclass
class SignState:
    """Where the loop stands."""

    potentials: Leaf  # `Potentials`
    rows: Leaf  # `Rows` of the plan
    columns: Leaf  # `Rows` of the plan seen from the columns
    step: Leaf  # f[]
    iterations: Leaf  # i[]


def dual(problem: RRhoProblem, potentials: Potentials, rows: Rows) -> Float[Array, ""]:
    """g = zeta - C_s Psi, the dual of R_rho^rho (Lemma 6)."""
    psi = (jnp.exp(problem.log_a) * penalty_rows(problem, rows)).sum()
    return zeta(problem, potentials) - jnp.exp(problem.log_k) / problem.s * psi


def start_of_signs(problem: RRhoProblem, step: float | Float[Array, ""]) -> SignState:
    """alpha = beta = 0."""
    zero = Potentials(jnp.zeros_like(problem.log_a), jnp.zeros_like(problem.log_b))
    step = jnp.asarray(step, problem.rho.dtype)
    return _seen(problem, zero, step, jnp.zeros((), jnp.int32))


def ascend(
    problem: RRhoProblem,
    state: SignState,
    eps: float | Float[Array, ""],
    most: int | Int[Array, ""],
    *,
    backtracking: bool,
) -> SignState:
    """The loop, until both marginals are met within `eps` or `most` steps are done.

    Args:
      backtracking: halve the step where the dual would fall; the paper's loop does not.
    """

    def goes_on(state: SignState) -> Bool[Array, ""]:
        row_error, column_error = _errors(problem, state)
        is_open = jnp.maximum(row_error, column_error) >= eps
        return is_open & (state.iterations < most) & (state.step > SMALLEST_STEP)

    def advance(state: SignState) -> SignState:
        row_error, _ = _errors(problem, state)
        old = state.potentials
        alpha = old.alpha - state.step * jnp.sign(state.rows.log_ratio)
        beta = old.beta + state.step * jnp.sign(state.columns.log_ratio)
        by_rows = row_error >= eps
        moved = Potentials(jnp.where(by_rows, alpha, old.alpha), jnp.where(by_rows, old.beta, beta))
        new = _seen(problem, moved, state.step, state.iterations + 1)
        if not backtracking:
            return new
        rises = dual(problem, moved, new.rows) > dual(problem, old, state.rows)
        kept = replace(state, step=state.step / 2, iterations=state.iterations + 1)
        return lax.cond(rises, lambda: new, lambda: kept)

    return lax.while_loop(goes_on, advance, state)


def solve_by_signs(
    problem: RRhoProblem, tol: float | Float[Array, ""], most: int | Int[Array, ""]
) -> Solution:
    """Rounds of the loop, each to a quarter of the last one's marginal error, until the bracket is
    within `tol`, the steps have become tiny or `most` times `ITERATIONS` steps are done."""
    total = most * ITERATIONS

    def bracket_of(state: SignState) -> Bracket:
        return certify(problem, state.potentials, state.rows)

    def goes_on(carry: tuple[SignState, Bracket, Array]) -> Bool[Array, ""]:
        state, bracket, _ = carry
        moves = (state.iterations < total) & (state.step > SMALLEST_STEP)
        return (bracket.relative_gap > tol) & moves

    def advance(carry: tuple[SignState, Bracket, Array]) -> tuple[SignState, Bracket, Array]:
        state, _, eps = carry
        state = ascend(problem, state, eps, total, backtracking=True)
        return state, bracket_of(state), eps / 4

    first = start_of_signs(problem, FIRST_STEP)
    eps = jnp.asarray(0.05, problem.rho.dtype)
    state, bracket, _ = lax.while_loop(goes_on, advance, (first, bracket_of(first), eps))
    error = marginal_error(problem, state.potentials, state.rows)
    converged = bracket.relative_gap <= tol
    return Solution(state.potentials, bracket, error, state.iterations, converged)


def _errors(problem: RRhoProblem, state: SignState) -> tuple[Array, Array]:
    return error_of(problem.log_a, state.rows), error_of(problem.log_b, state.columns)


def _seen(problem: RRhoProblem, potentials: Potentials, step: Array, count: Array) -> SignState:
    rows = rows_of(problem, potentials)
    columns = rows_of(problem.swapped, mirrored(potentials))
    return SignState(potentials, rows, columns, step, count)
