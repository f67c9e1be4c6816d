"""Rotary frequencies equal the torch reference's at real sizes; rotations see only distances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.config import RopeConfig
from jaxinfer.models.registry import config_from_hf
from jaxinfer.nn.rope import _by_halves, _by_pairs, inverse_frequencies, rotate, rotation

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}
SHORT_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONG_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
REAL = {
    "Llama-2": (128, {"rope_type": "default", "rope_theta": 1e4}),
    "Vicuna-16k": (128, {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    "Llama-3.1": (128, {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0} | LLAMA3),
    "Llama-3.2": (64, {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0} | LLAMA3),
    "Qwen2.5": (128, {"rope_type": "yarn", "rope_theta": 1e6} | YARN),
    "untruncated": (64, {"rope_type": "yarn", "rope_theta": 1.5e5, "truncate": False} | YARN),
    # The channels of beta_fast and of beta_slow turns lie outside of the rotary ones.
    "YaRN before the first channel": (64, {"rope_theta": 1e4} | SHORT_YARN),
    "YaRN behind the last channel": (32, {"rope_theta": 10.0} | LONG_YARN),
}


@pytest.mark.parametrize("name", REAL)
def test_frequencies_equal_the_reference_at_real_sizes(name):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    head_dim, parameters = REAL[name]
    hf = llama.LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=131072,
        rope_parameters=dict(parameters),
    )
    reference = llama.LlamaRotaryEmbedding(hf)
    rope = config_from_hf(hf.to_dict()).rope
    np.testing.assert_allclose(inverse_frequencies(rope), reference.inv_freq.numpy(), rtol=5e-7)
    assert rope.attention_factor == pytest.approx(reference.attention_scaling)


def test_a_score_depends_on_the_distance_only():
    rope = RopeConfig(rotary_dim=16)
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))

    def score(i, j):
        at = [rotation(rope, jnp.full((1, 1), p, jnp.int32)) for p in (i, j)]
        return float((rotate(q, at[0]) * rotate(k, at[1])).sum())

    assert score(9, 4) == pytest.approx(score(105, 100), rel=1e-4)


def test_channels_beyond_the_rotary_ones_pass_through():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 10))
    turn = rotation(RopeConfig(rotary_dim=4), jnp.ones((2, 4), jnp.int32))
    y = rotate(x, turn)
    assert jnp.array_equal(y[..., 4:], x[..., 4:])
    assert not jnp.isclose(y[..., :4], x[..., :4]).all()


def test_a_rotation_keeps_the_dtype_and_applies_the_attention_factor():
    x = jnp.ones((1, 1, 1, 8), jnp.bfloat16)
    still = rotation(RopeConfig(rotary_dim=8, attention_factor=2.0), jnp.zeros((1, 1), jnp.int32))
    y = rotate(x, still)
    assert y.dtype == jnp.bfloat16
    assert (y == 2).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpu_and_a_cpu_rotate_alike(dtype):
    x = jax.random.normal(jax.random.key(0), (2, 3, 5, 24), dtype)
    turns = rotation(RopeConfig(rotary_dim=24), jnp.arange(10, dtype=jnp.int32).reshape(2, 5) * 37)
    cos, sin = turns.cos[:, None], turns.sin[:, None]
    found, expected = (np.asarray(f(x, cos, sin), np.float32) for f in (_by_pairs, _by_halves))
    # Sums of two products, of which a compiler may round one less.
    tolerance = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=4 * tolerance)
