"""Predictors in Flax and the routers that they become score alike."""

import jax
import numpy as np
import pytest

from jaxinfer.sparsity.base import Rule
from jaxinfer.sparsity.predictors import Predictor, matrices, rank_of, router, stacked

L, R, D, J, P = 3, 7, 32, 48, 16


@pytest.mark.parametrize(
    ("width", "rank"),
    [(32, 32), (256, 32), (576, 32), (768, 48), (2048, 128), (4096, 256), (65536, 1024)],
)
def test_the_rank_follows_the_width(width, rank):
    """dejavu.md 2.1."""
    assert rank_of(width) == rank


def test_every_layer_has_a_predictor_of_its_own_without_biases():
    module, x = stacked(J, P), jax.random.normal(jax.random.key(1), (L, R, D))
    params = module.init(jax.random.key(0), x)["params"]
    shapes = jax.tree.map(np.shape, params)
    assert shapes == {"inner": {"kernel": (L, D, P)}, "outer": {"kernel": (L, P, J)}}
    assert not np.allclose(params["inner"]["kernel"][0], params["inner"]["kernel"][1])
    scores = module.apply({"params": params}, x)
    for layer in range(L):
        own = jax.tree.map(lambda leaf: leaf[layer], params)  # noqa: B023
        alone = Predictor(J, P).apply({"params": own}, x[layer])
        np.testing.assert_allclose(scores[layer], alone, atol=1e-5)
        served = router(matrices(own), Rule(most=5), 0.0)
        assert (served.units, served.width) == (J, D)
        np.testing.assert_allclose(served.scores(x[layer]), scores[layer], atol=1e-5)
