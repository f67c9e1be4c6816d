"""`r_rho`: the distance between two weighted point clouds, with a bracket that proves it."""

import contextlib
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from jaxinfer.arguments import one_of, real, whole
from jaxinfer.runtime.program import Program
from jaxinfer.theory.transport.bounds import one_pass_bounds
from jaxinfer.theory.transport.certify import Bracket
from jaxinfer.theory.transport.problem import (
    LARGEST,
    Distribution,
    RRhoProblem,
    check_rho,
    default_lift,
    distribution,
    is_same,
    problem_of,
)
from jaxinfer.theory.transport.sampled import solve_sampled
from jaxinfer.theory.transport.sign_ascent import solve_by_signs
from jaxinfer.theory.transport.solve import Solution, solve

METHODS = ("auto", "alternating", "sign_ascent", "sampled", "bounds")
EXACT_PAIRS = 4 * 10**8
"""Up to so many pairs `auto` passes over all of them."""
MOST_SWEEPS = 2000
SATURATED = 0.95
"""Share of the product coupling's cost above which a distance says little (section 8)."""


@dataclass(frozen=True)
class RRhoOutput:
    """R_rho of two distributions, in the units of the points.

    Where `lift` is not 0, all is of the distance with costs sqrt(||x - y||^2 + lift^2), which is
    at least R_rho.
    """

    value: float
    """The lower end, whose error is of second order in that of the marginals."""
    lower: float
    upper: float
    potentials: tuple[np.ndarray, np.ndarray]
    """(alpha f64[N], beta f64[M]) of the given points, in their units to the power rho."""
    marginal_error: float
    """How far the plan's row and column sums are from the weights, in L1; NaN from `bounds`."""
    sweeps: int
    converged: bool
    """Whether (upper - lower) / upper is within the tolerance."""
    saturation: float
    """Share of the product coupling's cost; above 0.95 the distance says little (section 8)."""
    method: str
    lift: float
    exact: bool = True
    """Whether the bracket holds for certain; else it is an interval at 99 % (`sampled`)."""


def r_rho(
    x: object,
    y: object,
    a: object = None,
    b: object = None,
    rho: float = 1.1,
    method: str = "auto",
    tol: float = 1e-3,
    *,
    lift: float | None = None,
    most_sweeps: int = MOST_SWEEPS,
    seed: int = 0,
) -> RRhoOutput:
    """The relaxation R_rho of optimal transport (arXiv 2307.10042, equation 2).

    The least of (sum_ij a_i b_j (gamma_ij ||x_i - y_j|| / (a_i b_j))^rho)^(1/rho) over couplings
    gamma of `a` and `b`: a metric, between the earth mover's distance (rho = 1) and the cost of the
    product coupling. Memory grows with n + m. Computed in the points' dtype: float64 whatever JAX
    is set to, for which nothing is changed. The arrays are read; to differentiate or batch, use
    `jaxinfer.theory.transport.distance`.

    Args:
      x, y: points [n, d] and [m, d], float32 or float64 (whole numbers count as float64).
      a, b: weights [n] and [m] that add up to 1; uniform where left out.
      rho: above 1, at most 10. 1.1 informs well and converges in some 10 to 70 sweeps; below 1.05
        takes many more.
      method: `alternating` (exact, ours), `sign_ascent` (the paper's loop; slow), `sampled` (a
        share of the pairs), `bounds` (one pass) or `auto`: alternating up to 400 million pairs,
        then sampled.
      tol: relative width of the bracket at which it ends.
      lift: added to every cost as sqrt(c^2 + lift^2); left out, 0 for disjoint supports, else a
        thousandth of the median distance.
      most_sweeps: passes over rows and columns after which it ends unconverged.
      seed: of the samples.

    Raises:
      ValueError: arguments that are none of this, with what was expected.

    Example:
      >>> round(r_rho([[0.0, 0.0]], [[3.0, 4.0], [0.0, 5.0]], rho=2.0).value, 9)
      5.0
    """
    rho, method = check_rho(rho), one_of("method", method, METHODS)
    tol, seed = real("tol", tol, 1e-12, 1), whole("seed", seed, 0)
    most = whole("most_sweeps", most_sweeps)
    if any(isinstance(z, Tracer) for z in (x, y, a, b)):
        raise ValueError(
            "r_rho reads its arrays, got traced ones; inside jit, grad or vmap call "
            "jaxinfer.theory.transport.distance"
        )
    one, other = distribution("x", x, "a", a), distribution("y", y, "b", b)
    if one.points.shape[1] != other.points.shape[1]:
        raise ValueError(
            "x and y must have equally many dimensions, got "
            f"{one.points.shape[1]} and {other.points.shape[1]}"
        )
    if is_same(one, other) and not lift:
        return _zero(one, other, method)
    lift = default_lift(one, other) if lift is None else real("lift", lift, 0, LARGEST)
    if method == "auto":
        pairs = len(one.points) * len(other.points)
        method = "alternating" if pairs <= EXACT_PAIRS else "sampled"
    kind = np.result_type(one.points, other.points)
    with jax.enable_x64(True) if kind == np.float64 else contextlib.nullcontext():
        arrays = (one.points, other.points, one.weights, other.weights)
        on_device = [jnp.asarray(z.astype(kind)) for z in arrays]
        scalars = [jnp.asarray(z, kind) for z in (rho, lift)]
        problem, unit = _problem(*on_device, *scalars, bracketed=rho > 2)
        found, exact = _solved(problem, method, tol, most, seed)
        found = jax.tree.map(np.asarray, found)
    return _output(found, float(unit), rho, (one, other), method, lift, exact)


def _solved(
    problem: RRhoProblem, method: str, tol: float, most: int, seed: int
) -> tuple[Solution, bool]:
    """The solution, and whether its bracket is certain."""
    if method == "sampled":
        return solve_sampled(problem, tol, most, seed)
    run = {"alternating": _alternating, "sign_ascent": _sign_ascent, "bounds": _one_pass}[method]
    limits = jnp.asarray(tol, problem.rho.dtype), jnp.asarray(most, jnp.int32)
    return run(problem, *limits), True


def _of_bounds(problem: RRhoProblem, tol: Array, most: Array) -> Solution:
    found = one_pass_bounds(problem)
    bracket = Bracket(found.lower, found.product, found.product)
    error = jnp.full_like(problem.rho, jnp.nan)
    converged = bracket.relative_gap <= tol
    return Solution(found.potentials, bracket, error, jnp.zeros((), jnp.int32), converged)


_problem = Program(problem_of, static_argnames=("bracketed",))
_alternating, _sign_ascent, _one_pass = map(Program, (solve, solve_by_signs, _of_bounds))


def _output(
    found: Solution,
    unit: float,
    rho: float,
    sides: tuple[Distribution, Distribution],
    method: str,
    lift: float,
    exact: bool,
) -> RRhoOutput:
    bracket, one, other = found.bracket, *sides
    lower, product = unit * float(bracket.lower), unit * float(bracket.product)
    alpha, beta = (
        z.astype(np.float64) * unit**rho for z in (found.potentials.alpha, found.potentials.beta)
    )
    return RRhoOutput(
        value=lower,
        lower=lower,
        upper=max(unit * float(bracket.upper), lower),  # they may cross by a rounding
        potentials=(alpha[one.place], beta[other.place]),
        marginal_error=float(found.marginal_error),
        sweeps=int(found.sweeps),
        converged=bool(found.converged),
        saturation=lower / product,
        method=method,
        lift=lift,
        exact=exact,
    )


def _zero(one: Distribution, other: Distribution, method: str) -> RRhoOutput:
    """Of a distribution and itself."""
    potentials = np.zeros(len(one.place)), np.zeros(len(other.place))
    return RRhoOutput(0.0, 0.0, 0.0, potentials, 0.0, 0, True, 0.0, method, 0.0)
