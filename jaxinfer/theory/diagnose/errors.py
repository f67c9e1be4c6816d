"""How far a layer's keys, values and outputs are from the plain ones when they come from a cache.

Keys and values are compared as the cache gives them back when a text was read, weighed by the
attention that the second half of the text's queries give them without compression: what nobody
looks at may be wrong. Axis letters: Q texts, R the tokens of all texts.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxinfer.models.walk import LayerView
from jaxinfer.runtime.program import Program
from jaxinfer.theory.transport.problem import problem_of
from jaxinfer.theory.transport.solve import solve

TOL, MOST_SWEEPS = 1e-2, 1000  # of a bracket, whose lower end is an order closer
LIFT, LIFT_EVICTED = 0.03, 0.1
"""Of the median distance to the mean, what costs are lifted by: with less, pairs that are equal
stall the solver, most of all where some tokens are gone and those kept are as they were."""
SAME = 1e-5  # of the largest number: what reading back may round
CERTAIN = 0.25  # share of a sample that goes to the tokens with the largest mass

NUMBERS = ("r_rho", "mean_distance", "l2")
PER_KV_HEAD = (*(f"{what}.{x}" for what in ("keys", "values") for x in NUMBERS), "kept_mass")
"""Errors of key/value heads [K]."""


class Sample(NamedTuple):
    """Some of the tokens of all texts, and of how many each is one."""

    rows: Int[np.ndarray, " P"]
    counts: Float[np.ndarray, " P"]


def received_mass(view: LayerView, block: int = 128) -> Float[np.ndarray, "K R"]:
    """The attention that the queries of the second half of each text give to each token, summed
    over a key/value head's query heads; it adds up to 1 over all texts."""
    texts, size, heads = view.k.shape[:3]
    found = np.zeros((texts, heads, size))
    for text in range(texts):
        first = 0
        for weights in view.attention(text, block):
            late = first + np.arange(len(weights)) >= size // 2
            received = weights[late].sum(axis=0, dtype=np.float64)  # [N, T]
            found[text] += received.reshape(heads, -1, size).sum(axis=1)
            first += len(weights)
    found /= np.maximum(found.sum(axis=2, keepdims=True), np.finfo(np.float64).tiny) * texts
    return found.swapaxes(0, 1).reshape(heads, -1)


def sample_of(mass: Float[np.ndarray, "K R"], points: int, seed: int = 0) -> Sample:
    """At most `points` tokens: those of the largest mass for certain, of the others some, each of
    which stands for several."""
    total = mass.shape[1]
    if total <= points:
        return Sample(np.arange(total), np.ones(total))
    order = np.argsort(-mass.mean(axis=0), kind="stable")
    certain = max(int(CERTAIN * points), 1)
    drawn = np.random.default_rng(seed).permutation(order[certain:])[: points - certain]
    counts = np.where(np.arange(points) < certain, 1.0, (total - certain) / (points - certain))
    return Sample(np.concatenate([order[:certain], drawn]), counts)


def errors_of(
    plain: LayerView, view: LayerView, mass: Float[np.ndarray, "K R"], sample: Sample, rho: float
) -> dict[str, np.ndarray]:
    """The errors of a layer that reads through a cache.

    `PER_KV_HEAD`, f32[K]: of keys and of values `l2` and `mean_distance`, of pairs, where an
    evicted token's copy is zero, `l2` over the norm of all; and `r_rho` of the two weighted clouds,
    in which the mass of an evicted token goes to those that are kept, over that of equal errors in
    all pairs and over the cloud's spread; it resolves little below `LIFT`. `kept_mass` is what the
    kept tokens receive. `output`, f32[N]: of what heads give, relative L2. `added`, f32[]: of what
    attention adds to the states, over their size; it sees the low-rank state of LESS, which keys
    and values do not.

    Args:
      plain: the layer without compression.
      view: the same with it, of `jaxinfer.models.walk.reread`.
      mass: of `received_mass`.
      sample: the tokens between which R_rho is computed.
      rho: above 1.
    """
    stored = [view.stored(text) for text in range(len(view.lengths))]
    kept = np.concatenate([one.kept for one in stored], axis=1)  # [K, R]
    found: dict[str, np.ndarray] = {"kept_mass": (mass * kept).sum(axis=1)}
    pairs = {
        "keys": (plain.k, np.concatenate([one.k for one in stored], axis=1)),
        "values": (plain.v, np.concatenate([one.v for one in stored], axis=1)),
    }
    for name, (own, copies) in pairs.items():
        points = own.transpose(2, 0, 1, 3).reshape(copies.shape)  # [K, R, H]
        apart = np.square(points - copies).sum(axis=2)
        norms = (mass * np.square(points).sum(axis=2)).sum(axis=1)
        found[f"{name}.mean_distance"] = (mass * np.sqrt(apart)).sum(axis=1)
        found[f"{name}.l2"] = np.sqrt((mass * apart).sum(axis=1) / np.where(norms > 0, norms, 1))
        found[f"{name}.r_rho"] = _clouds_apart(points, copies, kept, mass, sample, rho)
    heads = np.square(plain.heads - view.heads).sum(axis=(0, 1, 3))
    sizes = np.square(plain.heads).sum(axis=(0, 1, 3))
    found["output"] = np.sqrt(heads / np.where(sizes > 0, sizes, 1))
    change = np.linalg.norm(plain.mixed - view.mixed)
    found["added"] = np.asarray(change / np.linalg.norm(plain.after))
    return {key: np.asarray(x, np.float32) for key, x in found.items()}


def _clouds_apart(
    points: Float[np.ndarray, "K R H"],
    copies: Float[np.ndarray, "K R H"],
    kept: np.ndarray,
    mass: Float[np.ndarray, "K R"],
    sample: Sample,
    rho: float,
) -> Float[np.ndarray, " K"]:
    """R_rho per point over the cloud's spread, head by head; ours.

    The cost of the coupling that leaves each pair alone, at equal errors e and weights a, is
    e (sum a^(2 - rho))^(1 / rho), by which the value is divided: n^(1/s) of uniform weights.
    """
    x, y = points[:, sample.rows], copies[:, sample.rows]
    a = mass[:, sample.rows] * sample.counts
    a /= np.maximum(a.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    b = a * kept[:, sample.rows]
    held = b.sum(axis=1)
    # Of a head that keeps none of the sample, all mass goes to the mean of what it does keep.
    for head in np.flatnonzero(held == 0):
        own = kept[head]
        y[head] = copies[head][own].mean(axis=0) if own.any() else 0
        b[head] = a[head]
    b /= np.where(held > 0, held, 1)[:, None]
    centre = (a[..., None] * x).sum(axis=1, keepdims=True)
    spread = np.sqrt((a * np.square(x - centre).sum(axis=2)).sum(axis=1))
    largest = np.abs(x).max() or 1.0
    lift = np.where((b > 0).sum(axis=1) < (a > 0).sum(axis=1), LIFT_EVICTED, LIFT)
    value = np.asarray(
        _values(*(np.asarray(z, np.float32) for z in (x / largest, y / largest, a, b, lift)), rho)
    )
    value = value * largest
    per_point = np.power(a, 2 - rho, where=a > 0, out=np.zeros_like(a)).sum(axis=1) ** (1 / rho)
    same = kept.all(axis=1) & (np.abs(x - y).max(axis=(1, 2)) <= SAME * largest)
    return np.where(same | (spread == 0), 0.0, value / per_point / np.where(spread > 0, spread, 1))


@partial(Program, static_argnames=("rho",))
def _values(
    x: Float[Array, "K P H"], y: Float[Array, "K P H"], a: Float[Array, "K P"],
    b: Float[Array, "K P"], lift: Float[Array, " K"], rho: float,
) -> Float[Array, " K"]:  # fmt: skip
    """Each head's R_rho with all costs lifted, as a kept token and its copy may be equal: the lower
    end of its bracket, or the middle of one that stayed open."""

    def of(head: tuple[Array, Array, Array, Array, Array]) -> Float[Array, ""]:
        x, y, a, b, lift = head
        centre = (a[:, None] * x).sum(axis=0)
        lift = lift * jnp.median(jnp.linalg.norm(x - centre, axis=1))
        lift = jnp.maximum(lift, jnp.finfo(x.dtype).eps)
        problem, unit = problem_of(x, y, a, b, rho, lift)
        found = solve(problem, TOL, MOST_SWEEPS)
        middle = (found.bracket.lower + found.bracket.upper) / 2
        return unit * jnp.where(found.converged, found.bracket.lower, middle)

    with jax.default_matmul_precision("highest"):
        return lax.map(of, (x, y, a, b, lift))
