"""Values of R_rho against references, closed forms and what must hold of every metric."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.runtime.program import Program
from jaxinfer.theory.transport.bounds import one_pass_bounds
from jaxinfer.theory.transport.problem import problem_of
from tests.theory.r_rho_instances import (
    EMD,
    REFERENCE,
    RHOS,
    SHAPES,
    Instance,
    drawn,
    padded,
    small,
    solved,
    uniform,
)


@pytest.mark.parametrize("column", range(len(RHOS)), ids=RHOS)
def test_reference_values_in_float64(column):
    """r_rho_transport.md 12.1: all five seeds at one rho."""
    reference = np.asarray([row[column] for row in REFERENCE])
    found = solved([small(seed) for seed in range(5)], RHOS[column], tol=1e-8)
    assert found.solution.converged.all()
    np.testing.assert_allclose(found.lower, reference, rtol=1e-6)
    np.testing.assert_allclose(found.upper, reference, rtol=1e-6)
    # the table has ten decimals
    assert (found.lower <= reference * (1 + 1e-9) + 5e-11).all()
    assert (found.upper >= reference * (1 - 1e-9) - 5e-11).all()


@pytest.mark.parametrize("column", range(len(RHOS)), ids=RHOS)
def test_reference_values_in_float32(column):
    """r_rho_transport.md 12.1."""
    reference = np.asarray([row[column] for row in REFERENCE])
    instances = [small(seed) for seed in range(5)]
    found = solved(instances, RHOS[column], tol=1e-5, dtype=np.float32)
    assert found.lower.dtype == np.float32
    np.testing.assert_allclose(found.lower, reference, rtol=2e-5)


def test_closed_forms():
    """r_rho_transport.md 12.2: a Dirac, two points on each side, and a circulant cost."""
    one = small(0)
    dirac = Instance(one.x[:1], one.y, np.ones(1), one.b)
    p, q = 0.3, 1.7
    side = np.sqrt(q**2 - p**2)
    square = uniform([[0, 0], [side, 0]], [[0, p], [side, p]])
    angles = 2 * np.pi * np.arange(6) / 6
    ring = uniform(*[np.stack([np.cos(z), np.sin(z)], 1) for z in (angles, angles + 0.2)])
    for rho in (1.1, 1.5, 2.0):
        s = rho / (rho - 1)
        kernel = (ring.cost() ** -s).mean(axis=1)
        np.testing.assert_allclose(kernel, kernel[0])
        expected = [
            (dirac.b @ dirac.cost()[0] ** rho) ** (1 / rho),
            ((p**-s + q**-s) / 2) ** (-1 / s),
            kernel[0] ** (-1 / s),
        ]
        found = solved([dirac, square, ring], rho, tol=1e-11)
        np.testing.assert_allclose(found.lower, expected, rtol=1e-10)
    printed = {1.1: 0.3195123266818508, 1.5: 0.377286435756013, 2.0: 0.4178082794647106}
    for rho, value in printed.items():
        np.testing.assert_allclose(solved([square], rho, 1e-11).lower, value, rtol=1e-10)


def test_scaling_translation_swap_and_split():
    """r_rho_transport.md 12.2."""
    one = small(2)
    x, y, a, b = one
    split = Instance(
        np.concatenate([x, x[:1]]), y, np.concatenate([[a[0] / 3], a[1:], [2 * a[0] / 3]]), b
    )
    changed = [one, Instance(10 * x, 10 * y, a, b), Instance(x + 7, y + 7, a, b)]
    changed += [Instance(y, x, b, a), split]
    for rho in (1.1, 1.5):
        found = solved(changed, rho, tol=1e-11).lower
        np.testing.assert_allclose(found / [1, 10, 1, 1, 1], found[0], rtol=1e-10)


def test_near_the_earth_movers_distance_and_monotone():
    """r_rho_transport.md 12.3, table 3: ratios to the linear program's value. For 1.005 see
    test_r_rho_peers.py."""
    ratios = {
        1.01: 1.0166, 1.02: 1.0316, 1.05: 1.0698, 1.1: 1.118, 1.25: 1.197,
        1.5: 1.251, 2.0: 1.301, 3.0: 1.356, 5.0: 1.425,
    }  # fmt: skip
    found = [float(solved([small(3)], rho, tol=1e-4).lower[0]) for rho in ratios]
    assert found[0] >= EMD[3]
    np.testing.assert_allclose(np.asarray(found) / EMD[3], list(ratios.values()), atol=6e-4)
    assert (np.diff(found) > 0).all()


def test_bounds_are_in_order_on_random_instances():
    """r_rho_transport.md 12.3: CONST <= ROW, COL <= R <= PROD, a hundred times."""
    rng = np.random.default_rng(0)
    for rho in RHOS:
        instances = [drawn(rng, *rng.integers(2, 9, 2), 3) for _ in range(20)]
        found = solved(instances, rho, tol=1e-6)
        for one, upper in zip(instances, found.upper, strict=True):
            c, s, weight = one.cost(), rho / (rho - 1), np.outer(one.a, one.b)
            const = (weight * c**-s).sum() ** (-1 / s)
            row = (one.a @ (c**-s @ one.b) ** (1 - rho)) ** (1 / rho)
            column = (one.b @ (one.a @ c**-s) ** (1 - rho)) ** (1 / rho)
            product = (weight * c**rho).sum() ** (1 / rho)
            assert const <= min(row, column) * (1 + 1e-12)
            assert max(row, column) <= upper * (1 + 1e-12) <= product * (1 + 1e-9)
        assert (found.lower <= found.upper * (1 + 1e-12)).all()


def test_one_pass_bounds():
    """r_rho_transport.md section 7, and the dual bound of their potentials is the better one."""
    printed = {
        (3, 1.25): (1.689580, 2.543045, 2.449216, 3.238995),
        (4, 2.0): (3.898445, 4.042003, 4.063004, 4.370631),
    }
    prepare, run = Program(problem_of), Program(one_pass_bounds)
    with jax.enable_x64(True):
        for (seed, rho), expected in printed.items():
            arrays = map(jnp.asarray, padded(small(seed), 20, 8))
            problem, unit = prepare(*arrays, jnp.asarray(rho))
            found = run(problem)
            values = [found.const, found.row, found.column, found.product]
            np.testing.assert_allclose(np.asarray(values) * unit, expected, atol=1e-6)


SLOW_RHOS = [pytest.param(rho, marks=pytest.mark.slow) for rho in (1.05, 1.1, 1.25)]


@pytest.mark.parametrize("rho", [*SLOW_RHOS, 1.5, 2.0])
def test_triangle_inequality(rho):
    """r_rho_transport.md 12.4: a hundred random triples, twenty at every rho."""
    rng = np.random.default_rng(1)
    sides = [[], [], []]
    for _ in range(20):
        clouds = []
        for count in rng.integers(3, 8, 3):
            weights = rng.random(count) + 0.1
            clouds.append((rng.normal(size=(count, 2)), weights / weights.sum()))
        for side, (one, other) in zip(sides, itertools.combinations(clouds, 2), strict=True):
            side.append(Instance(one[0], other[0], one[1], other[1]))
    lengths = np.stack([solved(side, rho, tol=1e-6).upper for side in sides])
    for left, right, whole in itertools.permutations(lengths):
        assert (whole <= left + right + 1e-8).all()


def test_lifted_distances_of_a_shared_support():
    """r_rho_transport.md 12.4, section 7: decreasing to the exact value 1.3086495806."""
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(5, 2)), rng.normal(size=(4, 2))
    one = uniform(x, np.concatenate([x[:2], y[:2]]))
    lifts = (0.1, 0.03, 0.01, 0.003)
    found = solved([one] * 4, 1.5, tol=1e-5, lifts=lifts)
    printed = np.asarray([1.321487, 1.310539, 1.308990, 1.308703])
    # a small lift leaves pairs that are bound to each other, for which many sweeps are needed
    assert (found.lower < printed + 1e-6).all() and (found.upper > printed - 1e-6).all()
    assert (found.upper < found.lower * (1 + 5e-4)).all()
    assert (np.diff(found.upper) < 0).all() and found.upper[-1] > 1.3086495806
    same = solved([uniform(x, x)], 1.5, tol=1e-7, lifts=[0.01]).lower
    np.testing.assert_allclose(same, 0.0170997, atol=1e-6)


def test_optimum_of_seed_0():
    """r_rho_transport.md section 7: potentials and plan at rho 1.5."""
    one = small(0)
    found = solved([one], 1.5, tol=1e-12)
    scale, s = found.unit[0] ** 1.5, 3.0
    alpha, beta = (np.asarray(z)[0] * scale for z in (
        found.solution.potentials.alpha, found.solution.potentials.beta
    ))  # fmt: skip
    alpha, beta = alpha[: SHAPES[0][0]], beta[: SHAPES[0][1]]
    printed = (1.522093, 2.222016, 1.228460, 4.397953)
    np.testing.assert_allclose(alpha - beta.mean(), printed, atol=2e-5)
    printed = (0.359795, 0.876039, -2.599665, 0.128348, 1.235482)
    np.testing.assert_allclose(beta - beta.mean(), printed, atol=2e-5)
    gap = np.maximum(alpha[:, None] - beta, 0)
    plan = (1 - 1 / s) ** (s - 1) * np.outer(one.a, one.b) * gap ** (s - 1) / one.cost() ** s
    np.testing.assert_allclose(plan[0, 0], 0.104532, atol=1e-6)
    assert plan[2, 4] == 0
    np.testing.assert_allclose(plan.sum(axis=1), one.a, atol=1e-5)
    np.testing.assert_allclose(found.lower**1.5, 1.43797346, rtol=1e-8)
