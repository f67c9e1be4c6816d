"""R_rho and Sinkhorn against solvers that we did not write."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from jaxinfer.theory.transport import debiased, paired, sinkhorn
from tests.theory.r_rho_instances import EMD, REFERENCE, small, solved


def test_primal_by_scipy():
    """The definition itself, minimised over couplings of 4 and 5 atoms, knows no dual."""
    one, rho = small(0), 1.5
    weight, c = np.outer(one.a, one.b), one.cost()
    shape = c.shape
    rows = np.kron(np.eye(shape[0]), np.ones(shape[1]))
    columns = np.kron(np.ones(shape[0]), np.eye(shape[1]))
    matrix = np.concatenate([rows, columns[1:]])  # one constraint follows from the others
    given = np.r_[one.a, one.b[1:]]

    def density(plan):
        return np.maximum(plan, 0) * c.ravel() / weight.ravel()

    found = minimize(
        lambda plan: (weight.ravel() * density(plan) ** rho).sum(),
        weight.ravel(),
        jac=lambda plan: rho * c.ravel() * density(plan) ** (rho - 1),
        bounds=[(0, None)] * c.size,
        constraints={"type": "eq", "fun": lambda plan: matrix @ plan - given},
        method="SLSQP",
        options={"maxiter": 1000, "ftol": 1e-14},
    )
    assert found.success
    ours = solved([one], rho, tol=1e-9)
    np.testing.assert_allclose(ours.upper[0], found.fun ** (1 / rho), rtol=1e-8)
    assert ours.lower[0] <= found.fun ** (1 / rho) * (1 + 1e-9)


def test_dual_by_scipy():
    """L-BFGS on Lemma 6's dual of 20 and 20 atoms, written in numpy."""
    one, rho = small(4), 1.25
    s = rho / (rho - 1)
    weight, c, scale = np.outer(one.a, one.b), one.cost(), 1 / s * (1 - 1 / s) ** (s - 1)
    n = len(one.a)

    def negative_dual(z):
        gap = np.maximum(z[:n, None] - z[n:], 0) / c
        flow = scale * s * weight * gap ** (s - 1) / c
        value = one.a @ z[:n] - one.b @ z[n:] - scale * (weight * gap**s).sum()
        return -value, np.r_[flow.sum(axis=1) - one.a, one.b - flow.sum(axis=0)]

    start = np.r_[np.full(n, c.mean()), np.zeros(len(one.b))]
    found = minimize(
        negative_dual, start, jac=True, method="L-BFGS-B",
        options={"maxiter": 20000, "maxfun": 20000, "ftol": 1e-15, "gtol": 1e-10},
    )  # fmt: skip
    np.testing.assert_allclose((-found.fun) ** (1 / rho), REFERENCE[4][2], rtol=1e-6)
    np.testing.assert_allclose(solved([one], rho).lower[0], (-found.fun) ** (1 / rho), rtol=1e-6)


def test_the_earth_movers_limit_against_pot():
    """r_rho_transport.md 12.3: rho 1.005 is within 0.9 % of POT's emd2, from above."""
    import ot

    one = small(3)
    exact = ot.emd2(one.a, one.b, one.cost())
    np.testing.assert_allclose(exact, EMD[3], rtol=1e-9)
    ours = float(solved([one], 1.005, tol=2e-4).lower[0])
    assert exact <= ours <= 1.009 * exact


@pytest.mark.slow
def test_sinkhorn_against_ott():
    """Its dense mode: potentials, plan and cost at one epsilon."""
    from ott.geometry import costs, pointcloud
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import sinkhorn as ott_sinkhorn

    with jax.enable_x64(True):
        x, y, a, b = (jnp.asarray(z) for z in small(4))
        geometry = pointcloud.PointCloud(x, y, cost_fn=costs.Euclidean(), epsilon=0.3)
        solver = ott_sinkhorn.Sinkhorn(threshold=1e-9, max_iterations=5000)
        theirs = solver(linear_problem.LinearProblem(geometry, a, b))
        ours = jax.jit(lambda *z: sinkhorn(*z, 0.3, tol=1e-9))(x, y, a, b)
        cost = np.linalg.norm(np.asarray(x)[:, None] - np.asarray(y), axis=2)
        plan = np.asarray(a)[:, None] * np.asarray(b)
        plan = plan * np.exp((np.asarray(ours.f)[:, None] + np.asarray(ours.g) - cost) / 0.3)
        np.testing.assert_allclose(plan, theirs.matrix, atol=1e-8)
        np.testing.assert_allclose(ours.cost, theirs.primal_cost, rtol=1e-7)
        np.testing.assert_allclose(ours.cost, (plan * cost).sum(), rtol=1e-7)
        entropy = (plan * np.log(plan / (np.asarray(a)[:, None] * np.asarray(b)))).sum()
        np.testing.assert_allclose(ours.dual, (plan * cost).sum() + 0.3 * entropy, rtol=1e-7)


def test_pairs_with_small_errors_cost_their_error():
    """r_rho_transport.md table 4: per point R is the identity's cost while errors are small."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 3))  # the shape of an instance in test_r_rho_input.py
    y = x + 0.02 * rng.normal(size=x.shape)
    found = paired(x, y, tol=1e-4)
    np.testing.assert_allclose(found.value, found.identity, rtol=1e-3)
    assert found.permuted >= 1 - found.gap and found.mean_distance <= found.identity
    same = paired(x, x)
    assert same.value == 0 and same.permuted == 1
    # a permutation of the copies is nothing to a distance between clouds
    mixed = paired(x, y[::-1].copy(), tol=1e-4)
    assert mixed.permuted > 5
    np.testing.assert_allclose(mixed.value, found.value, rtol=1e-9)


def test_debiased_tells_a_shift_from_none():
    """r_rho_transport.md table 6, small: p-value and value of shifted and of equal laws."""
    rng = np.random.default_rng(0)
    x, same, far = rng.normal(size=(3, 40, 3)).astype(np.float32)
    far[:, 0] += 3
    shifted = debiased(x, far, permutations=39)
    assert shifted.p_value == 1 / 40 and shifted.value > 1
    equal = debiased(x, same, permutations=39)
    assert equal.p_value > 0.05 and abs(equal.value) < 0.5
    assert min(equal.within) > 0.3  # what the raw distance would have been mistaken for
