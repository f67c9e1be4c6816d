"""Derivatives of R_rho by the envelope theorem, and the memory of all of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.runtime.program import Program
from jaxinfer.theory.transport import distance
from jaxinfer.theory.transport.certify import certify
from jaxinfer.theory.transport.problem import RRhoProblem
from jaxinfer.theory.transport.solver import Potentials
from tests.theory.r_rho_instances import small, solved

RHO, STEP = 1.5, 1e-5


@Program
def _gradients(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    of = jax.grad(lambda *z: distance(*z, rho=RHO, tol=1e-11), argnums=(0, 1, 2, 3))
    return of(*arrays)


def all_gradients(*arrays: np.ndarray) -> list[np.ndarray]:
    """By x, y, a and b, in float64."""
    with jax.enable_x64(True):
        return [np.asarray(z) for z in _gradients(*map(jnp.asarray, arrays))]


@pytest.fixture(scope="module")
def gradients() -> list[np.ndarray]:
    """Of seed 0."""
    return all_gradients(*small(0))


def test_points_against_central_differences(gradients):
    """r_rho_transport.md 12.5, and the printed row of section 7."""
    one = small(0)
    for which, name in enumerate(("x", "y")):
        points = one[which]
        found = []
        for index in np.ndindex(points.shape):
            for sign in (1, -1):
                moved = points.copy()
                moved[index] += sign * STEP
                found.append(one._replace(**{name: moved}))
        values = solved(found, RHO, tol=1e-12).lower
        differences = (values[::2] - values[1::2]).reshape(points.shape) / (2 * STEP)
        np.testing.assert_allclose(gradients[which], differences, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(gradients[0][0], (0.182280, 0.035443), atol=1e-6)


def test_weights_against_central_differences(gradients):
    """r_rho_transport.md 12.5: along (1, -1, 0, 0) the derivative of R^rho is -0.5896412."""
    one = small(0)
    value = solved([one], RHO, tol=1e-12).lower[0]
    along = gradients[2][0] - gradients[2][1]
    np.testing.assert_allclose(RHO * value ** (RHO - 1) * along, -0.5896412, rtol=1e-6)
    for which, name in ((2, "a"), (3, "b")):
        direction = np.zeros(len(one[which]))
        direction[:2] = 1, -1
        moved = [one._replace(**{name: one[which] + s * STEP * direction}) for s in (1, -1)]
        plus, minus = solved(moved, RHO, tol=1e-12).lower
        slope = gradients[which][0] - gradients[which][1]
        np.testing.assert_allclose(slope, (plus - minus) / (2 * STEP), rtol=1e-6)


def test_gradient_by_the_points_is_a_translation_and_a_scaling(gradients):
    """Moving both clouds changes nothing, and R is homogeneous of degree 1 (Euler)."""
    by_x, by_y = gradients[:2]
    one = small(0)
    np.testing.assert_allclose(by_x.sum(axis=0) + by_y.sum(axis=0), 0, atol=1e-12)
    value = (by_x * one.x).sum() + (by_y * one.y).sum()
    np.testing.assert_allclose(value, solved([one], RHO, tol=1e-12).lower[0], rtol=1e-9)


def test_gradients_where_there_are_none_are_finite():
    """At R = 0: all points of both clouds are one."""
    one = small(0)
    found = all_gradients(np.zeros_like(one.x), np.zeros_like(one.y), one.a, one.b)
    assert all(np.isfinite(z).all() for z in found)


def test_memory_does_not_grow_with_the_pairs():
    """Tiles, not clouds: a plan of these points would take 64 MiB."""
    size = 4096
    like = [jax.ShapeDtypeStruct(shape, np.float32) for shape in ((size, 4), (size,), ())]
    points, weights, scalar = like
    problem = RRhoProblem(points, points, weights, weights, scalar, scalar)
    potentials = Potentials(weights, weights)
    compiled = jax.jit(certify).lower(problem, potentials).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < size * size * 4 / 16
