"""Entropic optimal transport on the same blocked passes: a baseline, never n x m in memory.

Sinkhorn's algorithm in logarithms for cost c_ij = ||x_i - y_j|| and the regulariser
eps KL(gamma | a x b) (Cuturi 2013, arXiv 1306.0895; the log domain as in arXiv 1803.00567, section
4.4). Exact up to its stopping rule.
"""

import flax.struct
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxinfer.theory.transport.blocked import squared_distances, weigh
from jaxinfer.typing import Leaf


@flax.struct.dataclass
class SinkhornOutput:
    """The plan is a_i b_j exp((f_i + g_j - c_ij) / eps)."""

    f: Leaf  # f[N]
    g: Leaf  # f[M]
    cost: Leaf  # f[], sum gamma_ij c_ij, of a plan whose rows are off by `marginal_error`
    dual: Leaf  # f[], the regularised value that f and g prove
    marginal_error: Leaf  # f[], L1 of the rows; the columns are met
    iterations: Leaf  # i[]


def sinkhorn(
    x: Float[Array, "N D"],
    y: Float[Array, "M D"],
    a: Float[Array, " N"],
    b: Float[Array, " M"],
    epsilon: float | Float[Array, ""],
    *,
    tol: float | Float[Array, ""] = 1e-3,
    most: int | Int[Array, ""] = 2000,
) -> SinkhornOutput:
    """Potentials whose rows are within `tol` of the weights, in L1.

    Args:
      epsilon: above 0, in the unit of the distances.
      most: iterations, each of two passes over all pairs.
    """
    log_a, log_b = jnp.log(a), jnp.log(b)

    def row_pass(x: Array, y: Array, g: Array, log_b: Array) -> tuple[Array, Array]:
        """-eps log sum_j b_j exp((g_j - c_ij) / eps), and the mean cost of every row."""

        def term(x, column):
            y, g, log_b = column
            squared = squared_distances(x, y)
            c = jnp.sqrt(jnp.maximum(squared, jnp.finfo(x.dtype).tiny))
            return log_b + (g - c) / epsilon, (c,)

        found = weigh(term, x, (y, g, log_b))
        return -epsilon * found.log_total, found.means[0]

    def met(f: Array, g: Array, count: Array) -> tuple[SinkhornOutput, Array]:
        """The plan of f and g, and the f that fits g."""
        fitted, mean = row_pass(x, y, g, log_b)
        shipped = a * jnp.exp((f - fitted) / epsilon)
        dual = (a * f).sum() + (b * g).sum() - epsilon * (shipped.sum() - 1)
        error = jnp.abs(shipped - a).sum()
        return SinkhornOutput(f, g, (shipped * mean).sum(), dual, error, count), fitted

    def advance(carry: tuple[SinkhornOutput, Array]) -> tuple[SinkhornOutput, Array]:
        found, f = carry
        g, _ = row_pass(y, x, f, log_a)
        return met(f, g, found.iterations + 1)

    def goes_on(carry: tuple[SinkhornOutput, Array]) -> Bool[Array, ""]:
        found, _ = carry
        return (found.marginal_error > tol) & (found.iterations < most)

    first = met(jnp.zeros_like(a), jnp.zeros_like(b), jnp.zeros((), jnp.int32))
    return lax.while_loop(goes_on, advance, first)[0]
