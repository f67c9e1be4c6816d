"""What a row of the plan ships, estimated from a share of its pairs without bias.

The kernel c^-s is singular at 0, so a few near neighbours can be most of a row and uniform draws
miss them. A row therefore takes all points of the leaves nearest to it, and draws of the others: a
cell of points with probability 0.9 of its guessed share and 0.1 of a uniform one, then a point of
the cell (specification, section 6; ours).
"""

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxinfer.theory.transport.blocked import squared_distances
from jaxinfer.theory.transport.problem import RRhoProblem
from jaxinfer.theory.transport.solver import Potentials, Rows
from jaxinfer.typing import Leaf

BLOCK = 256  # rows at once
CELLS = 256  # at most; more guess better and cost more
GUESSED = 0.9


@flax.struct.dataclass
class Sampling:
    """Of one side: where its rows find the other side's points."""

    near: Leaf  # i[N, Q], the leaves that every row takes whole
    leaf: int = flax.struct.field(pytree_node=False)  # places of a leaf of the other side
    draws: int = flax.struct.field(pytree_node=False)  # 0 where the near leaves are all


@flax.struct.dataclass
class _Cells:
    """The other side, coarsely: runs of leaves, each a subtree."""

    centre: Leaf  # f[C, D]
    spread: Leaf  # f[C], mean squared distance from the centre
    log_mass: Leaf  # f[C]
    beta: Leaf  # f[C], mean


def nearest_leaves(
    x: Float[Array, "N D"], y: Float[Array, "M D"], leaves: int, count: int
) -> Int[Array, "N Q"]:
    """The `count` leaves of y, which are equal runs, with their mean nearest to every row."""
    centre = y.reshape(leaves, -1, y.shape[1]).mean(axis=1)

    def nearest(row: Array) -> Array:
        return lax.top_k(-squared_distances(row[None], centre)[0], count)[1]

    return lax.map(nearest, x, batch_size=BLOCK)


def estimated_rows(
    problem: RRhoProblem,
    potentials: Potentials,
    sampling: Sampling,
    key: PRNGKeyArray,
    log_b: Float[Array, " M"] | None = None,
) -> Rows:
    """`solver.rows_of` from the near leaves and the draws.

    The total is unbiased; its logarithm and the means, which are ratios, nearly so.
    """
    weights = problem.log_b if log_b is None else log_b
    cells = _cells(problem, potentials, weights, sampling)

    def of_row(row: tuple[Array, ...]) -> Rows:
        x, alpha, near, key = row
        place, log_factor = _places(problem, cells, sampling, x, alpha, near, key)
        squared = jnp.square(x - problem.y[place]).sum(axis=1) + jnp.square(problem.lift)
        log_c = jnp.log(jnp.maximum(squared, jnp.finfo(x.dtype).tiny)) / 2
        gap = alpha - potentials.beta[place]
        safe = jnp.where(gap > 0, gap, 1)
        log_w = weights[place] + (problem.s - 1) * jnp.log(safe) - problem.s * log_c + log_factor
        log_w = jnp.where((gap > 0) & (weights[place] > -jnp.inf), log_w, -jnp.inf)
        top = jnp.maximum(log_w.max(), jnp.finfo(x.dtype).min / 2)
        w = jnp.exp(log_w - top)
        total = jnp.maximum(w.sum(), jnp.finfo(x.dtype).tiny)
        log_ratio = jnp.where(w.sum() > 0, top + jnp.log(total) + problem.log_k, -jnp.inf)
        return Rows(log_ratio, (w / safe).sum() / total, (w * safe).sum() / total)

    keys = jax.random.split(key, problem.x.shape[0])
    rows = (problem.x, potentials.alpha, sampling.near, keys)
    return lax.map(of_row, rows, batch_size=BLOCK)


def _cells(
    problem: RRhoProblem, potentials: Potentials, log_b: Array, sampling: Sampling
) -> _Cells:
    count = min(CELLS, problem.y.shape[0] // sampling.leaf)
    y = problem.y.reshape(count, -1, problem.y.shape[1])
    centre = y.mean(axis=1)
    return _Cells(
        centre=centre,
        spread=jnp.square(y - centre[:, None]).sum(axis=2).mean(axis=1),
        log_mass=logsumexp(log_b.reshape(count, -1), axis=1),
        beta=potentials.beta.reshape(count, -1).mean(axis=1),
    )


def _places(
    problem: RRhoProblem,
    cells: _Cells,
    sampling: Sampling,
    x: Array,
    alpha: Array,
    near: Array,
    key: Array,
) -> tuple[Array, Array]:
    """Places on the other side that one row looks at, and the log factor of each."""
    leaf, draws = sampling.leaf, sampling.draws
    whole = (near[:, None] * leaf + jnp.arange(leaf)).reshape(-1)
    if draws == 0:
        return whole, jnp.zeros(whole.shape, x.dtype)
    count = cells.beta.shape[0]
    per_cell = problem.y.shape[0] // count
    squared = jnp.square(x - cells.centre).sum(axis=1) + cells.spread + jnp.square(problem.lift)
    gap = jnp.maximum(alpha - cells.beta, 1e-3 * jnp.abs(alpha) + jnp.finfo(x.dtype).tiny)
    log_share = cells.log_mass + (problem.s - 1) * jnp.log(gap)
    log_share -= problem.s / 2 * jnp.log(jnp.maximum(squared, jnp.finfo(x.dtype).tiny))
    share = GUESSED * jax.nn.softmax(log_share) + (1 - GUESSED) / count
    for_cell, for_place = jax.random.split(key)
    # one offset for evenly spaced points: less noise than independent draws, and no bias
    offset = jax.random.uniform(for_cell, (), x.dtype)
    points = (jnp.arange(draws) + offset) / draws
    reached = jnp.cumsum(share)
    cell = jnp.minimum(jnp.searchsorted(reached / reached[-1], points), count - 1)
    drawn = cell * per_cell + jax.random.randint(for_place, (draws,), 0, per_cell)
    is_near = (drawn[:, None] // leaf == near).any(axis=1)  # has been counted
    log_factor = -jnp.log(draws * share[cell] / per_cell)
    log_factor = jnp.where(is_near, -jnp.inf, log_factor)
    return jnp.concatenate([whole, drawn]), jnp.concatenate(
        [jnp.zeros(whole.shape, x.dtype), log_factor]
    )
