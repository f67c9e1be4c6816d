"""How fast the methods are, in sweeps, and what the sampled one loses."""

import functools
from collections.abc import Iterable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.runtime.program import Program
from jaxinfer.theory import r_rho
from jaxinfer.theory.transport.certify import lower_bound
from jaxinfer.theory.transport.estimates import estimated_rows
from jaxinfer.theory.transport.leaves import leaves_of
from jaxinfer.theory.transport.problem import problem_of
from jaxinfer.theory.transport.sampled import in_leaves, samplings_of, solve_sampled
from jaxinfer.theory.transport.sign_ascent import (
    Preprocessing,
    ascend,
    preprocessing,
    preprocessing_error,
    start_of_signs,
)
from jaxinfer.theory.transport.solver import Potentials, alternate, rows_of, start
from tests.theory.r_rho_instances import (
    REFERENCE,
    Instance,
    g200,
    m256,
    padded,
    small,
    uniform,
)

TABLE_1 = {
    1.02: (2.7304439, (63, 120, 421)),
    1.05: (3.02804100, (20, 34, 99)),
    1.1: (3.37689573, (8, 12, 23)),
    1.25: (3.79809267, (3, 4, 7)),
    1.5: (3.97422426, (2, 3, 4)),
    2.0: (4.08637487, (2, 2, 3)),
}
"""rho: R and the sweeps to a marginal error of 1e-2, 1e-3 and 1e-5."""
TABLE_2 = {
    1.05: (6.001936, (54, 191, 412, 865)),
    1.1: (6.731437, (23, 68, 166, 246)),
    1.25: (8.377060, (6, 18, 35, 60)),
    1.5: (10.261687, (2, 6, 11, 17)),
    2.0: (11.991075, (1, 3, 4, 6)),
}
"""The same to 1e-1, 1e-2, 1e-3 and 1e-4."""

_problem = jax.jit(problem_of)
_loop = jax.jit(functools.partial(ascend, backtracking=False))
_start, _alternate = jax.jit(start), jax.jit(alternate)
_lower = jax.jit(lambda problem, state: lower_bound(problem, state.potentials, state.rows))


def check_sweeps(
    instance: Instance, table: dict, errors: tuple[float, ...], rhos: Iterable[float]
) -> None:
    with jax.enable_x64(True):
        arrays = [jnp.asarray(z) for z in padded(instance, 256, 16)]
        for rho in rhos:
            value, counts = table[rho]
            problem, unit = _problem(*arrays, rho)
            state, gaps = _start(problem), {}
            for error, count in zip(errors, counts, strict=True):
                state = _alternate(problem, state, jnp.asarray(error), jnp.asarray(1200))
                assert abs(int(state.sweeps) - count) <= 0.2 * count, (rho, error)
                gaps[error] = 1 - float(_lower(problem, state) * unit) / value
            assert -1e-6 < gaps[1e-2] <= 2e-3 and abs(gaps[errors[-1]]) < 1e-5


def test_sweep_counts():
    """r_rho_transport.md 12.6, and a marginal error of 1e-2 costs at most 2e-3 of the value."""
    check_sweeps(g200(), TABLE_1, (1e-2, 1e-3, 1e-5), (1.05, 1.1, 1.25, 1.5, 2.0))
    check_sweeps(m256(), TABLE_2, (1e-1, 1e-2, 1e-3, 1e-4), (1.25, 1.5, 2.0))


@pytest.mark.slow
def test_sweep_counts_near_1():
    """r_rho_transport.md 12.6, where there are hundreds."""
    check_sweeps(g200(), TABLE_1, (1e-2, 1e-3, 1e-5), (1.02,))
    check_sweeps(m256(), TABLE_2, (1e-1, 1e-2, 1e-3, 1e-4), (1.05, 1.1))


def slow(*values: object):
    return pytest.param(*values, marks=pytest.mark.slow)


PAPER = [
    slow(1.05, 723, 0.13),
    slow(1.1, 652, 0.37),
    slow(1.25, 605, 0.58),
    slow(1.5, 572, 0.84),
    (2.0, 495, 1.25),
]


@pytest.mark.parametrize("rho, steps, percent", PAPER)
def test_the_papers_loop(rho, steps, percent):
    """r_rho_transport.md 12.7: step 1e-3, eps 0.05, costs over the largest one."""
    one = g200()
    largest = one.cost().max()
    with jax.enable_x64(True):
        arrays = map(jnp.asarray, (one.x / largest, one.y / largest, one.a, one.b))
        problem, unit = _problem(*arrays, rho)
        problem = replace(problem, x=problem.x * unit, y=problem.y * unit)
        state = _loop(problem, start_of_signs(problem, 1e-3), jnp.asarray(0.05), 2000)
        gap = 1 - float(_lower(problem, state) * largest) / TABLE_1[rho][0]
    assert abs(int(state.iterations) - steps) <= 0.01 * steps
    assert abs(100 * gap - percent) <= 0.02


def test_preprocessing_with_the_corrected_sigma():
    """r_rho_transport.md 12.7, section 4: the printed constants break Lemma 9's bound."""
    for n, rho, eps, printed in (
        (1000, 1.25, 0.1, 2.82),
        (1000, 1.1, 0.1, 0.44),
        (100, 1.5, 0.2, 9.6),
    ):
        wrong = Preprocessing(sigma=eps**rho, sigma_weight=eps**rho / n)
        stated = n ** (rho - 1) * wrong.sigma / wrong.sigma_weight ** (rho - 1)
        stated = (stated + wrong.sigma_weight) ** (1 / rho)
        np.testing.assert_allclose(stated, printed, rtol=0.01)
        assert preprocessing_error(n, rho, preprocessing(n, rho, eps)) <= eps * (1 + 1e-12)


@pytest.mark.slow
def test_every_method_brackets_the_reference():
    """r_rho_transport.md 12.1: LB <= ref <= UB, whatever the method."""
    reference = REFERENCE[3][2]
    for method in ("sign_ascent", "sampled", "bounds"):
        found = r_rho(*small(3), rho=1.25, method=method, tol=1e-2)
        assert found.lower <= reference * (1 + 1e-9) and found.upper >= reference * (1 - 1e-9)
        assert found.converged or method == "bounds"


def test_leaves_are_a_permutation():
    points = np.random.default_rng(0).normal(size=(300, 3))
    leaves = leaves_of(points)
    assert leaves.count * leaves.size == len(leaves.order) and leaves.size <= 32
    assert sorted(leaves.order[leaves.real]) == list(range(300))
    np.testing.assert_array_equal(leaves.back(points[leaves.order]), points)
    boxes = points[leaves.order].reshape(leaves.count, leaves.size, 3)
    assert np.ptp(boxes, axis=1).prod(axis=1).mean() < np.ptp(points, axis=0).prod() / 4


def test_estimated_rows_are_unbiased():
    """r_rho_transport.md 12.8: |mean error| / its standard error < 4 over 200 repeats."""
    rng = np.random.default_rng(0)
    one = uniform(rng.normal(size=(64, 4)), rng.normal(size=(512, 4)) + 0.5)
    problem, _ = _problem(*[jnp.asarray(z, jnp.float32) for z in one], 1.25)
    sides = leaves_of(np.asarray(problem.x)), leaves_of(np.asarray(problem.y))
    ordered = in_leaves(problem, *sides)
    sampling, _ = samplings_of(ordered, *sides, pairs=64)
    assert sampling.draws and sampling.near.shape[1] == 1
    alpha = jnp.full(ordered.log_a.shape, 0.5)
    potentials = Potentials(
        alpha, jnp.asarray(rng.normal(size=ordered.log_b.shape) / 4, jnp.float32)
    )
    exact = jnp.exp(Program(rows_of)(ordered, potentials).log_ratio)
    keys = jax.random.split(jax.random.key(0), 200)

    @Program
    def repeats(keys):
        return jax.lax.map(
            lambda key: jnp.exp(estimated_rows(ordered, potentials, sampling, key).log_ratio), keys
        )

    ratios = np.asarray(repeats(keys) / exact)
    overall = ratios.mean(axis=1)  # rows are independent given the potentials
    z = (overall.mean() - 1) / (overall.std(ddof=1) / np.sqrt(200))
    assert abs(z) < 4 and 0.01 < ratios.std() < 3


SAMPLED = {"iso 1.25": 1.25, "iso 1.1": 1.1, "mix 1.25": 1.25}


def cloud_4096(kind: str) -> Instance:
    """Section 6: n = 4096, d = 16."""
    rng, n, d = np.random.default_rng(0), 4096, 16
    if kind == "iso":
        return uniform(rng.normal(size=(n, d)), rng.normal(size=(n, d)) + 0.5)
    centres = rng.normal(size=(20, d)) * 3
    x = centres[rng.integers(0, 20, n)] + rng.normal(size=(n, d)) * 0.7
    y = centres[rng.integers(0, 20, n)] + rng.normal(size=(n, d)) * 0.7 + 0.3
    return uniform(x, y)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_gaps(name):
    """r_rho_transport.md 12.8: 256 of 4096 pairs a row lose at most 5e-3 of the value."""
    x, y, a, b = (z.astype(np.float32) for z in cloud_4096(name.split()[0]))
    rho = SAMPLED[name]
    exact = r_rho(x, y, a, b, rho, tol=1e-4)
    assert exact.converged
    found = r_rho(x, y, a, b, rho, method="sampled")
    assert found.exact and found.lower <= exact.upper * (1 + 1e-6)
    assert 1 - found.lower / exact.upper <= 5e-3
    problem, unit = _problem(*map(jnp.asarray, (x, y, a, b)), rho)
    interval, certain = solve_sampled(problem, 1e-3, 200, 1, certified_pairs=0)
    assert not certain
    assert interval.bracket.lower * unit <= exact.upper <= interval.bracket.upper * unit * 1.001
