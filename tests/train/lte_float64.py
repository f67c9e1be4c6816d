"""Gradients of LTE's losses in float64: run as a script, since x64 is set per process.

    JAX_ENABLE_X64=1 python -m tests.train.lte_float64

It exits with an error where one is wrong (lte.md 7.3).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jaxinfer.models.params import init_params
from jaxinfer.train.lte.losses import efficiency, separation
from jaxinfer.train.lte.objective import learning
from jaxinfer.train.lte.student import Student
from tests.train.lte_toys import TEXT, TOYS, recipe

EPSILON = 1e-2


def check_the_formulas() -> None:
    """Section 2.3: the gradients for a logit z, of M entries."""
    z = jax.random.normal(jax.random.key(0), (6, 5), jnp.float64)
    g, entries = np.asarray(jax.nn.sigmoid(z)), z.size
    found = jax.grad(lambda z: efficiency(jax.nn.sigmoid(z)))(z)
    np.testing.assert_allclose(found, 2 * g**2 * (1 - g) / entries, rtol=1e-12)
    for epsilon in (0.0, EPSILON):
        found = jax.grad(lambda z, e=epsilon: separation(jax.nn.sigmoid(z), epsilon=e))(z)
        outer = -2 * (g - 0.5) / ((g - 0.5) ** 2 + epsilon) ** 2
        np.testing.assert_allclose(found, outer * g * (1 - g) / entries, rtol=1e-10)
    for loss in (efficiency, lambda scores: separation(scores, epsilon=EPSILON)):
        differences(lambda z, loss=loss: loss(jax.nn.sigmoid(z)), z)


def differences(function, at, subsets=(None,), count: int = 4, step: float = 1e-4):
    """The gradient along random directions (in a subset, where its tree is 1) against central
    differences; returns the gradient's function."""
    flat, unravel = ravel_pytree(at)
    assert flat.dtype == np.float64
    along = jax.jit(lambda x: function(unravel(x)))
    gradient = jax.jit(jax.grad(lambda x: function(unravel(x))))
    exact = gradient(flat)
    rng = np.random.default_rng(0)
    for subset in subsets:
        within = 1.0 if subset is None else ravel_pytree(subset)[0]
        for _ in range(count):
            d = within * jnp.asarray(rng.normal(size=flat.shape))
            d = d / jnp.linalg.norm(d)
            # the error of a central difference falls with the square of the step
            near, far = (
                float((along(flat + h * d) - along(flat - h * d)) / (2 * h))
                for h in (step, 2 * step)
            )
            found, wanted = (4 * near - far) / 3, float(exact @ d)
            assert abs(found - wanted) <= 1e-6 * abs(wanted) + 1e-10, (found, wanted)
    return lambda tree: gradient(ravel_pytree(tree)[0])


def check_stage_1() -> None:
    """The full loss on a model of two layers: for all parameters together, and for the routers."""
    cfg = TOYS["gated"]
    params = init_params(cfg, jax.random.key(0), jnp.float64)
    order = np.arange(cfg.intermediate_size, dtype=np.int32)
    student = Student.of(cfg, params, recipe("paper", separation=0.1), (order,) * cfg.num_layers)
    trained = wide(student.parts() | student.routers())
    batch = {"tokens": jnp.asarray(TEXT[:2]), "fixed": {}, "separation": jnp.float64(0.1)}
    loss = learning(student)

    def of(trained):
        return loss(trained, batch, jax.random.key(0))[0]

    only = jax.tree.map(jnp.zeros_like, trained) | {
        "routers": jax.tree.map(jnp.ones_like, trained["routers"])
    }
    gradient = differences(of, trained, subsets=(None, only))
    zero = trained | {"routers": jax.tree.map(jnp.zeros_like, trained["routers"])}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient(zero)))


def wide(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float64), tree)


if __name__ == "__main__":
    jnp.float32 = jnp.float64  # what accumulates in float32 would hide what is compared
    check_the_formulas()
    check_stage_1()
