"""Sums over all pairs of two point clouds, a tile at a time.

N sources and M targets have N M pairs; what is summed over them is never stored. As attention
kernels do, a pass keeps for each row the largest logarithm so far, and what the weights and their
products with a few factors add up to.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

CPU_TILE, DEVICE_TILE = (256, 256), (1024, 4096)
DIRECT = 16
"""Up to so many dimensions the differences themselves are cheap."""
NEAR = 1e-2
"""Below this share of |x|^2 + |y|^2 a squared distance from products has lost too many digits."""

Term: TypeAlias = Callable[[Any, Any], tuple[Array, tuple[Array, ...]]]
"""(rows of a tile, its columns) -> log weights [R, C] and the factors [R, C] to average by them."""


class Weighed(NamedTuple):
    """What `weigh` says of every row."""

    log_total: Float[Array, " N"]
    means: tuple[Float[Array, " N"], ...]
    mean_values: Float[Array, "N V"] | None


def tile_shape() -> tuple[int, int]:
    """Rows and columns of a tile on the default device."""
    return CPU_TILE if jax.default_backend() == "cpu" else DEVICE_TILE


def squared_distances(x: Float[Array, "R D"], y: Float[Array, "C D"]) -> Float[Array, "R C"]:
    """||x_i - y_j||^2, to a relative precision that near pairs keep.

    Matrix products are fast, but what they lose is relative to the norms, and a kernel ||x - y||^-s
    raises it to a high power; so a tile with near pairs is computed from the differences.
    """
    if x.shape[1] <= DIRECT:
        return _differences(x, y)
    norms = jnp.square(x).sum(1)[:, None] + jnp.square(y).sum(1)
    far = norms - 2 * jnp.matmul(x, y.T, precision=lax.Precision.HIGHEST)
    return lax.cond((far < NEAR * norms).any(), lambda: _differences(x, y), lambda: far)


def _differences(x: Float[Array, "R D"], y: Float[Array, "C D"]) -> Float[Array, "R C"]:
    def add(start: int, stop: int, total: Array) -> Array:
        for d in range(start, stop):  # one fused loop over the tile
            total += jnp.square(x[:, d, None] - y[:, d])
        return total

    total = jnp.zeros((x.shape[0], y.shape[0]), x.dtype)
    whole = x.shape[1] // DIRECT * DIRECT
    if whole > DIRECT:
        parts = [z[:, :whole].reshape(-1, whole // DIRECT, DIRECT).swapaxes(0, 1) for z in (x, y)]
        total, _ = lax.scan(lambda t, xy: (t + _differences(*xy), None), total, tuple(parts))
    else:
        total = add(0, whole, total)
    return add(whole, x.shape[1], total)


def weigh(
    term: Term, rows: Any, columns: Any, values: Float[Array, "M V"] | None = None
) -> Weighed:
    """log sum_j w_ij of every row i, and the means of factors (and of `values`) with weights w_ij.

    Args:
      term: gives log w and the factors of a tile.
      rows, columns: pytrees of arrays with N and with M rows, which `term` gets tiles of.
      values: a vector of every column to average too.

    Returns:
      `Weighed`; a row without weight has log total -inf and means 0.
    """
    height, width = tile_shape()
    count = _length(rows)
    below, right = min(height, count), min(width, _length(columns))
    tiles = _tiled((columns, values), right)
    valid = _tiled(jnp.ones(_length(columns), bool), right)

    def of_rows(block: Any) -> Weighed:
        return _weigh_rows(term, block, (*tiles, valid))

    found = lax.map(of_rows, _tiled(rows, below))
    return jax.tree.map(lambda z: z.reshape(-1, *z.shape[2:])[:count], found)


def _weigh_rows(term: Term, rows: Any, tiles: Any) -> Weighed:
    first, first_values, _ = jax.tree.map(lambda z: z[0], tiles)
    log_w, factors = jax.eval_shape(term, rows, first)
    zero = jnp.zeros(log_w.shape[0], log_w.dtype)
    floor = jnp.full_like(zero, jnp.finfo(log_w.dtype).min / 2)  # finite: -inf less -inf is NaN
    sums = (zero,) * (1 + len(factors))
    vector = None
    if first_values is not None:
        vector = jnp.zeros((log_w.shape[0], first_values.shape[1]), log_w.dtype)

    def add(carry: Any, tile: Any) -> tuple[Any, None]:
        top, sums, vector = carry
        column, value, valid = tile
        log_w, factors = term(rows, column)
        log_w = jnp.where(valid, log_w, -jnp.inf)
        new_top = jnp.maximum(top, log_w.max(axis=1))
        w = jnp.exp(log_w - new_top[:, None])
        shrink = jnp.exp(top - new_top)
        parts = (w, *(w * factor for factor in factors))
        sums = tuple(s * shrink + p.sum(axis=1) for s, p in zip(sums, parts, strict=True))
        if vector is not None:
            product = jnp.matmul(w, value, precision=lax.Precision.HIGHEST)
            vector = vector * shrink[:, None] + product
        return (new_top, sums, vector), None

    (top, (total, *rest), vector), _ = lax.scan(add, (floor, sums, vector), tiles)
    divisor = jnp.maximum(total, jnp.finfo(total.dtype).tiny)
    means = tuple(one / divisor for one in rest)
    mean_values = None if vector is None else vector / divisor[:, None]
    return Weighed(top + jnp.log(total), means, mean_values)


def add_up(term: Callable[[Any, Any], Array], rows: Any, columns: Any) -> Float[Array, "N V"]:
    """sum_j of V numbers for every row i, where `term` gives [R, V, C]; no logarithms."""
    height, width = tile_shape()
    count, of_columns = _length(rows), _length(columns)
    tiles = _tiled((columns, jnp.ones(of_columns, bool)), min(width, of_columns))

    def of_rows(block: Any) -> Array:
        def add(total: Array, tile: Any) -> tuple[Array, None]:
            column, valid = tile
            return total + jnp.where(valid, term(block, column), 0).sum(axis=-1), None

        like = jax.eval_shape(term, block, jax.tree.map(lambda z: z[0], tiles[0]))
        return lax.scan(add, jnp.zeros(like.shape[:-1], like.dtype), tiles)[0]

    found = lax.map(of_rows, _tiled(rows, min(height, count)))
    return found.reshape(-1, *found.shape[2:])[:count]


def _length(tree: Any) -> int:
    return jax.tree.leaves(tree)[0].shape[0]


def _tiled(tree: Any, size: int) -> Any:
    """Arrays [n, ...] as [n / size, size, ...], the last tile filled with zeros."""

    def tiled(z: Array) -> Array:
        filled = jnp.pad(z, [(0, -z.shape[0] % size)] + [(0, 0)] * (z.ndim - 1))
        return filled.reshape(-1, size, *z.shape[1:])

    return jax.tree.map(tiled, tree)
