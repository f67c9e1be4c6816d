"""KIVI behind a Hadamard rotation: the same scores, fewer outliers in a group of channels."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfer as ji
from jaxinfer import testing
from jaxinfer.cache.base import Geometry
from jaxinfer.cache.rotated import Rotated, rotated
from jaxinfer.testing.models import CONFIGS
from tests.cache.layer import H, Layer


def test_the_rotation_is_orthonormal_and_its_own_inverse():
    x = np.random.default_rng(0).standard_normal((3, 5, 64)).astype(np.float32)
    turned = np.asarray(rotated(jnp.asarray(x)))
    np.testing.assert_allclose(np.square(turned).sum(-1), np.square(x).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(rotated(jnp.asarray(turned)), x, atol=1e-5)
    one = np.zeros(64, np.float32)
    one[7] = 8.0
    np.testing.assert_allclose(np.abs(rotated(jnp.asarray(one))), np.ones(64), rtol=1e-6)


def policy(bits: int, residual: int = 8, **options) -> ji.Policy:
    return ji.kivi(
        bits, group=8, residual=residual, value_flush="block", rotation="hadamard",
        key_grouping="token", **options,
    )  # fmt: skip


def test_it_is_exact_with_a_large_residual_and_lossless_under_a_tree():
    testing.check_full_budget(policy(4, residual=64), "llama")
    testing.check_ragged_rows(policy(4), "llama")
    testing.check_speculation(policy(4), "llama")


@pytest.mark.slow
def test_it_keeps_what_a_policy_promises():
    testing.check_policy(
        easy=lambda: policy(4, residual=64),
        hard=lambda: policy(4),
        bytes_per_row=lambda made, geometry: made.tiers[0].inner.bytes_per_row(geometry),
        models=("llama",),
    )


def outputs(made: ji.Policy, outlier: float) -> np.ndarray:
    """Attention of 40 tokens whose keys and values have one large channel, token by token."""
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((1, heads, 40, H)) for heads in (4, 2, 2))
    k[..., 3] += outlier
    v[..., 5] += outlier
    layer = Layer(made, rope=None)
    return np.concatenate([layer.push(*(x[:, :, i : i + 1] for x in (q, k, v))) for i in range(40)])


@pytest.mark.parametrize("bits", [4, 8])
def test_an_outlier_channel_costs_a_group_of_channels_less_behind_the_rotation(bits):
    exact = outputs(ji.full(), 60.0)
    plain = ji.kivi(bits, group=8, residual=8, value_flush="block", key_grouping="token")
    errors = [np.abs(outputs(made, 60.0) - exact).mean() for made in (policy(bits), plain)]
    assert errors[0] < 0.75 * errors[1]


def test_settings_that_cannot_be_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match="rotation must be None or 'hadamard', got 'random'"):
        ji.kivi(rotation="random")
    geometry = Geometry(num_kv_heads=1, head_dim=24, capacity=64)
    with pytest.raises(ValueError, match="power of two, got 24"):
        policy(4).check(CONFIGS["llama"], geometry)


def test_a_mapping_asks_for_it_too():
    from jaxinfer.cache.presets import resolve

    (tier,) = resolve({"name": "kivi4", "rotation": "hadamard"}).tiers
    assert isinstance(tier, Rotated)
