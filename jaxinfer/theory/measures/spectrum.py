"""Ranks of a matrix that tell more than a count: stable rank and effective rank."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

VECTORS = 8  # that iterate together: singular values near the largest do not slow them down
MOST_ITERATIONS = 100


def largest_singular_value(matrix: Float[Array, "R C"], tolerance: float = 1e-6) -> Array:
    """|W|_2 by power iteration of a few orthonormal vectors, a scalar of the dtype of `matrix`.

    It ends when the square of the value grows by less than `tolerance` (relative), or after
    `MOST_ITERATIONS`. What it gives is never too large, but for rounding; where more than `VECTORS`
    values lie within a hundredth of the largest, it may be one of those.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    size = jnp.abs(wide).max()
    wide = wide / jnp.where(size > 0, size, 1)  # no square overflows
    count = min(VECTORS, wide.shape[0])
    # Fixed directions: the same matrix gives the same number.
    first = jax.random.normal(jax.random.key(0), (wide.shape[0], count), wide.dtype)

    def body(carry: tuple[Array, Array, Array, Array]):
        x, _, value, done = carry
        q, r = jnp.linalg.qr(wide @ (wide.T @ x))
        return q, value, jnp.linalg.norm(r, 2), done + 1

    def going(carry: tuple[Array, Array, Array, Array]) -> Array:
        _, before, value, done = carry
        return (jnp.abs(value - before) > tolerance * value) & (done < MOST_ITERATIONS)

    start = (jnp.linalg.qr(first)[0], -jnp.ones_like(size), jnp.zeros_like(size), jnp.asarray(0))
    # With orthonormal vectors the value is that of W W^T, from below.
    return size * jnp.sqrt(jax.lax.while_loop(going, body, body(start))[2])


def stable_rank(matrix: Float[Array, "R C"], tolerance: float = 1e-6) -> Array:
    """|W|_F^2 / |W|_2^2: 1 for rank one, n for the identity of n, 0 for zeros; no SVD is made."""
    size = jnp.abs(matrix).max()
    scaled = matrix / jnp.where(size > 0, size, 1)
    top = jnp.square(largest_singular_value(scaled, tolerance))
    return jnp.where(top > 0, jnp.square(scaled).sum() / jnp.where(top > 0, top, 1), 0)


def effective_rank(matrix: Float[Array, "R C"]) -> Array:
    """exp of the entropy of the singular values, each over their sum; 0 for zeros.

    All of them count, so this does make an SVD (without vectors): a Gram matrix would blur those
    below 1e-3 of the largest in float32.
    """
    values = jnp.linalg.svd(matrix, compute_uv=False)
    total = values.sum()
    shares = values / jnp.where(total > 0, total, 1)
    logs = jnp.log(jnp.where(shares > 0, shares, 1))
    return jnp.where(total > 0, jnp.exp(-(shares * logs).sum()), 0)
