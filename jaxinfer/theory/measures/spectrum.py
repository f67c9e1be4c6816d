"""Ranks of a matrix that tell more than a count: stable rank and effective rank."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

MOST_ITERATIONS = 200


def largest_singular_value(matrix: Float[Array, "R C"], tolerance: float = 1e-5) -> Array:
    """|W|_2 by power iteration, a scalar of the dtype of `matrix`.

    The iteration ends when the square of the value grows by less than `tolerance` (relative), or
    after `MOST_ITERATIONS`; close singular values slow the vector down, hardly the value.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    size = jnp.abs(wide).max()
    wide = wide / jnp.where(size > 0, size, 1)  # no square overflows
    # A fixed direction: the same matrix gives the same number.
    x = jax.random.normal(jax.random.key(0), wide.shape[:1], wide.dtype)

    def body(carry: tuple[Array, Array, Array, Array]):
        x, _, value, count = carry
        y = wide @ (x @ wide)
        new = jnp.linalg.norm(y)
        return y / jnp.where(new > 0, new, 1), value, new, count + 1

    def going(carry: tuple[Array, Array, Array, Array]) -> Array:
        _, before, value, count = carry
        return (jnp.abs(value - before) > tolerance * value) & (count < MOST_ITERATIONS)

    zero = jnp.zeros((), wide.dtype)
    start = (x / jnp.linalg.norm(x), zero - 1, zero, jnp.asarray(0))
    # The first product is with a vector of length 1: the value is then |W|_2 squared from below.
    return size * jnp.sqrt(jax.lax.while_loop(going, body, body(start))[2])


def stable_rank(matrix: Float[Array, "R C"], tolerance: float = 1e-5) -> Array:
    """|W|_F^2 / |W|_2^2: 1 for rank one, n for the identity of n, 0 for zeros; no SVD is made."""
    size = jnp.abs(matrix).max()
    scaled = matrix / jnp.where(size > 0, size, 1)
    top = jnp.square(largest_singular_value(scaled, tolerance))
    return jnp.where(top > 0, jnp.square(scaled).sum() / jnp.where(top > 0, top, 1), 0)


def effective_rank(matrix: Float[Array, "R C"]) -> Array:
    """exp of the entropy of the singular values, each over their sum; 0 for zeros.

    From the eigenvalues of the smaller Gram matrix, so singular values below about 1e-3 of the
    largest (float32) are blurred; they hardly count.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    size = jnp.abs(wide).max()
    wide = wide / jnp.where(size > 0, size, 1)
    values = jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(wide @ wide.T), 0))
    shares = values / jnp.where(size > 0, values.sum(), 1)
    logs = jnp.log(jnp.where(shares > 0, shares, 1))
    return jnp.where(size > 0, jnp.exp(-(shares * logs).sum()), 0)
