"""Two distributions in the form that the solvers take: merged, lifted, scaled, checked."""

from dataclasses import dataclass, replace

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxinfer.arguments import real, shown
from jaxinfer.typing import Leaf

SUM_ERROR = 1e-4  # of weights that a float32 softmax has made
LIFT = 1e-3  # of the median distance
MEDIAN_PAIRS = 4096
RHO_RANGE = (1.001, 10)
LARGEST = 1e15  # a coordinate, so that no power of a distance overflows


@flax.struct.dataclass
class RRhoProblem:
    """Two weighted point clouds and the exponent (arXiv 2307.10042, equation 2).

    The cost is c_ij = sqrt(||x_i - y_j||^2 + lift^2). All leaves have one dtype, so that one
    compiled program serves every rho; `jax.vmap` over the leaves solves a batch.
    """

    x: Leaf  # f[N, D]
    y: Leaf  # f[M, D]
    log_a: Leaf  # f[N], -inf for an atom without weight
    log_b: Leaf  # f[M]
    rho: Leaf  # f[], above 1
    lift: Leaf  # f[], in the units of the points
    bracketed: bool = flax.struct.field(pytree_node=False, default=False)
    """Whether steps are bracketed, which rho above 2 needs; see `solver.step`."""

    @property
    def s(self) -> Array:
        """The Hoelder conjugate rho / (rho - 1)."""
        return self.rho / (self.rho - 1)

    @property
    def log_k(self) -> Array:
        """log of k = (1 - 1/s)^(s-1), by which the plan follows from the potentials."""
        return -(self.s - 1) * jnp.log(self.rho)

    @property
    def swapped(self) -> "RRhoProblem":
        """The same distance from `y` to `x`; potentials (alpha, beta) become (-beta, -alpha)."""
        return replace(self, x=self.y, y=self.x, log_a=self.log_b, log_b=self.log_a)


def problem_of(
    x: Float[Array, "N D"],
    y: Float[Array, "M D"],
    a: Float[Array, " N"],
    b: Float[Array, " M"],
    rho: float | Float[Array, ""],
    lift: float | Float[Array, ""] = 0.0,
    bracketed: bool = False,
) -> tuple[RRhoProblem, Float[Array, ""]]:
    """The problem around its centre with distances of at most 1, and the unit of its distances.

    R_rho is homogeneous of degree 1 and invariant to translation. Works on traced arrays, and
    checks nothing.
    """
    centre = (x.sum(0) + y.sum(0)) / (x.shape[0] + y.shape[0])
    x, y = x - centre, y - centre
    # by the largest coordinate first, whose square may be 0 or infinite
    largest = jnp.maximum(jnp.abs(x).max(), jnp.abs(y).max())
    largest = jnp.maximum(largest, jnp.finfo(x.dtype).tiny)
    norms = [jnp.sqrt(jnp.square(z / largest).sum(axis=1).max()) for z in (x, y)]
    unit = 2 * largest * jnp.maximum(jnp.maximum(*norms), 1) + lift
    problem = RRhoProblem(
        x=x / unit,
        y=y / unit,
        log_a=jnp.log(a),
        log_b=jnp.log(b),
        rho=jnp.asarray(rho, x.dtype),
        lift=jnp.asarray(lift / unit, x.dtype),
        bracketed=bracketed,
    )
    return problem, unit


@dataclass(frozen=True)
class Distribution:
    """Distinct atoms with weights, and which of them each given point became."""

    points: np.ndarray  # f[N, D]
    weights: np.ndarray  # f[N], adding up to 1
    place: np.ndarray  # i[given]


def distribution(name: str, points: object, weight_name: str, weights: object) -> Distribution:
    """Checked points with equal ones merged, which changes no distance (specification, 1.1).

    Raises:
      ValueError: the points are not finite float32 or float64 [points, dimensions], or the weights
        are not one non-negative number for each, adding up to 1.
    """
    x = _floats(name, points)
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(
            f"{name} must be points of shape [points, dimensions], at least one of each, "
            f"got shape {list(x.shape)}"
        )
    if not (np.abs(x) <= LARGEST).all():  # NaN is not
        raise ValueError(
            f"{name} must be finite, of coordinates within {LARGEST:g}; remove the others or scale"
        )
    w = _weights(weight_name, weights, len(x), x.dtype)
    distinct, place = np.unique(x + 0.0, axis=0, return_inverse=True)
    place = place.reshape(-1)
    if len(distinct) == len(x):
        return Distribution(x, w, np.arange(len(x)))
    return Distribution(distinct, np.bincount(place, w).astype(x.dtype), place)


def check_rho(rho: object) -> float:
    """A rho above 1, at which the distance is not yet the earth mover's, and of use."""
    number = real("rho", rho)
    if not RHO_RANGE[0] <= number <= RHO_RANGE[1]:
        raise ValueError(
            f"rho must be from {RHO_RANGE[0]} to {RHO_RANGE[1]}, got {shown(rho)}; at 1 the "
            "distance is the earth mover's, which a linear program solves (ot.emd2 of POT)"
        )
    return number


def is_same(one: Distribution, other: Distribution) -> bool:
    """Whether two distributions are one, up to the rounding of weights that were merged."""
    (points, weights), (points_, weights_) = _support(one), _support(other)
    if not np.array_equal(points, points_):
        return False
    return np.allclose(weights, weights_, rtol=8 * np.finfo(weights.dtype).eps, atol=0)


def default_lift(one: Distribution, other: Distribution) -> float:
    """0 for disjoint supports, else a thousandth of the median distance (specification, 11).

    Where atoms coincide the dual has hard constraints, at which block ascent would stop too early;
    a small cost for every pair turns them into steep penalties.
    """
    supports = [z.points[z.weights > 0] for z in (one, other)]
    both = np.concatenate(supports)
    if len(np.unique(both + 0.0, axis=0)) == len(both):
        return 0.0
    rng = np.random.default_rng(0)
    x, y = (z[rng.integers(0, len(z), MEDIAN_PAIRS)].astype(np.float64) for z in supports)
    distances = np.linalg.norm(x - y, axis=1)
    apart = distances[distances > 0]
    return LIFT * float(np.median(apart)) if apart.size else LIFT


def _support(one: Distribution) -> tuple[np.ndarray, np.ndarray]:
    """Points in lexicographic order and weights, of the atoms that have one."""
    points, weights = one.points[one.weights > 0], one.weights[one.weights > 0]
    order = np.lexsort(points.T)
    return points[order], weights[order]


def _floats(name: str, value: object) -> np.ndarray:
    try:
        array = np.asarray(value)
    except ValueError:
        raise ValueError(f"{name} must be an array of numbers, got {shown(value)}") from None
    if array.dtype.kind in "iu":
        array = array.astype(np.float64)
    if array.dtype not in (np.float32, np.float64):
        raise ValueError(
            f"{name} must be float32 or float64, got {array.dtype}; half precision cannot hold "
            "distances to a high power, convert with .astype('float32')"
        )
    return array


def _weights(name: str, value: object, count: int, dtype: np.dtype) -> np.ndarray:
    if value is None:
        return np.full(count, 1 / count, dtype)
    w = _floats(name, value)
    if w.shape != (count,):
        raise ValueError(
            f"{name} must be one weight for each of {count} points, got shape {list(w.shape)}"
        )
    if not np.isfinite(w).all() or (w < 0).any():
        raise ValueError(f"{name} must be finite and not negative; got {shown(float(w.min()))}")
    total = w.sum(dtype=np.float64)
    if abs(total - 1) > SUM_ERROR:
        raise ValueError(f"{name} must add up to 1, got {total:.6g}; divide by the sum")
    return (w / total).astype(dtype)
