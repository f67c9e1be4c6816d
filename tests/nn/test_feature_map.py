"""LESS's feature maps against their formulas."""

import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.nn.feature_map import START, FeatureMaps

MAPS = FeatureMaps(num_heads=4, num_kv_heads=2, head_dim=8, hidden=16, rank=3, dropout=0.5)


def inputs(seed: int = 0):
    q, k = (jax.random.normal(jax.random.key(seed + i), (2, n, 5, 8)) for i, n in enumerate((4, 2)))
    return q, k


def kernels(scale: float = START):
    found = MAPS.init(jax.random.key(7), *inputs())["params"]
    return found | {name: jnp.full((2, 3), scale) for name in ("scale", "mix_scale")}


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def test_the_maps_are_those_of_the_paper():
    q, k = inputs()
    found = kernels(-0.3)  # psi takes the absolute value of one diagonal only
    phi = MAPS.apply({"params": found}, q, method="query")
    psi = MAPS.apply({"params": found}, k, method="key")
    w = {name: np.asarray(x, np.float64) for name, x in found.items()}
    for head in range(4):
        x = gelu(gelu(np.asarray(q, np.float64)[:, head] @ w["query_inner"][head])
                 @ w["query_outer"][head])  # fmt: skip
        np.testing.assert_allclose(phi[:, head], np.abs(x), atol=1e-6)
    for head in range(2):
        x = gelu(np.asarray(k, np.float64)[:, head] @ w["key_inner"][head])
        u = 0.3 * gelu(x @ w["key_outer"][head])
        np.testing.assert_allclose(psi[:, head], np.abs(u - 0.3 * u @ w["mix"][head]), atol=1e-6)


def test_features_are_float32_and_not_negative():
    q, k = inputs()
    phi, psi = MAPS.apply({"params": kernels(1.0)}, q.astype(jnp.bfloat16), k.astype(jnp.bfloat16))
    assert phi.shape == (2, 4, 5, 3) and psi.shape == (2, 2, 5, 3)
    assert phi.dtype == psi.dtype == jnp.float32
    assert (phi >= 0).all() and (psi >= 0).all()


def test_new_kernels_are_glorot_uniform_and_nearly_silent():
    found = kernels()
    for name in ("query_inner", "query_outer", "key_inner", "key_outer", "mix"):
        bound = math.sqrt(6 / sum(found[name].shape[-2:]))
        largest = np.abs(found[name]).max()
        assert 0.8 * bound < largest <= bound
    _, psi = MAPS.apply({"params": found}, *inputs())
    assert psi.max() < 10 * START


def test_a_key_of_zero_has_features_of_zero():
    psi = MAPS.apply({"params": kernels(1.0)}, jnp.zeros((1, 2, 1, 8)), method="key")
    assert (psi == 0).all()


@pytest.mark.parametrize("method", ["query", "key"])
def test_dropout_acts_in_training_only(method):
    x = inputs()[0 if method == "query" else 1]
    variables = {"params": kernels(1.0)}

    def features(train: bool, seed: int):
        rngs = {"dropout": jax.random.key(seed)}
        return MAPS.apply(variables, x, train, method=method, rngs=rngs)

    assert (features(False, 0) == features(False, 1)).all()
    assert (features(True, 0) != features(True, 1)).any()
    assert (features(True, 0) == features(True, 0)).all()


def test_kernels_tell_their_module():
    maps = FeatureMaps.of_params(kernels())
    assert maps == FeatureMaps(4, 2, 8, 16, 3, 0.0)


def test_the_library_starts_without_flax():
    code = "import sys, jaxinfer; sys.exit('flax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
