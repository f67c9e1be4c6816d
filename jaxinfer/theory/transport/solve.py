"""From a problem to a certified bracket, inside one compiled program."""

from dataclasses import replace

import flax.struct
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxinfer.theory.transport.certify import Bracket, certify, marginal_error
from jaxinfer.theory.transport.problem import RRhoProblem
from jaxinfer.theory.transport.solver import Potentials, alternate, start
from jaxinfer.typing import Leaf

BURST = 64
"""Sweeps at least after which the bracket is looked at in any case."""
STALLED, PATIENCE = 0.9, 2
"""So many bursts in turn that leave more than this share of the least marginal error yet met the
limit of the dtype."""


@flax.struct.dataclass
class Solution:
    """Potentials and what they prove, in the problem's unit."""

    potentials: Leaf  # `Potentials`
    bracket: Leaf  # `Bracket`
    marginal_error: Leaf  # f[], L1 of rows and columns together
    sweeps: Leaf  # i[]
    converged: Leaf  # bool[], whether the bracket is within the tolerance


@flax.struct.dataclass
class _Progress:
    state: Leaf  # `State`
    bracket: Leaf  # `Bracket`
    aim: Leaf  # f[], the marginal error of the next look
    least: Leaf  # f[], the smallest marginal error yet
    stalls: Leaf  # i[]


def solve(
    problem: RRhoProblem, tol: float | Float[Array, ""], most: int | Int[Array, ""]
) -> Solution:
    """Sweeps until (upper - lower) / upper <= tol, or until more sweeps do not help.

    A look at the bracket costs two sweeps. The bracket is narrower than half the marginal error, so
    the first look is at an error of 10 tol, the next ones at a quarter of the last each.
    `jax.vmap` solves a batch, at the pace of its slowest member.
    """

    def goes_on(now: _Progress) -> Bool[Array, ""]:
        is_open = ~(now.bracket.relative_gap <= tol)  # NaN before the first look
        return is_open & (now.stalls < PATIENCE) & (now.state.sweeps < most)

    def advance(now: _Progress) -> _Progress:
        burst = jnp.minimum(now.state.sweeps + jnp.maximum(BURST, now.state.sweeps // 2), most)
        state = alternate(problem, now.state, now.aim, burst)
        met = state.marginal_error <= now.aim
        little = ~met & (state.marginal_error > STALLED * now.least)
        found = certify(problem, state.potentials, state.rows)
        bracket = replace(
            found,
            lower=jnp.maximum(found.lower, now.bracket.lower),
            upper=jnp.minimum(found.upper, now.bracket.upper),
        )
        return _Progress(
            state=state,
            bracket=bracket,
            aim=jnp.where(met, now.aim / 4, now.aim),
            least=jnp.minimum(now.least, state.marginal_error),
            stalls=jnp.where(little, now.stalls + 1, 0),
        )

    zero, infinite = jnp.zeros_like(problem.rho), jnp.full_like(problem.rho, jnp.inf)
    unknown = Bracket(lower=zero, upper=infinite, product=infinite)
    aim = jnp.asarray(10 * tol, problem.rho.dtype)
    state = start(problem)
    first = _Progress(state, unknown, aim, state.marginal_error, jnp.zeros((), jnp.int32))
    end = lax.while_loop(goes_on, advance, first)
    potentials: Potentials = end.state.potentials
    return Solution(
        potentials=potentials,
        bracket=end.bracket,
        marginal_error=marginal_error(problem, potentials, end.state.rows),
        sweeps=end.state.sweeps,
        converged=end.bracket.relative_gap <= tol,
    )
