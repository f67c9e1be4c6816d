"""What KIVI promises beyond its numbers: bytes, accuracy, settings, writes in place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfer as ji
from jaxinfer.cache.base import Geometry, Items, bytes_of
from jaxinfer.cache.kivi import READ_BLOCK, Kivi
from jaxinfer.cache.kivi_preset import kivi
from jaxinfer.config import RopeConfig
from jaxinfer.eval import perplexity
from jaxinfer.inspection import hlo
from jaxinfer.nn.rope import rotate, rotation
from jaxinfer.ops.attention import (
    AttentionSpec,
    empty_partial,
    finish,
    merge,
)
from jaxinfer.ops.quantize import dequantize, quantize
from jaxinfer.testing.compare import assert_same
from jaxinfer.testing.models import CONFIGS
from tests.cache.kivi_tiers import (
    LAYOUTS,
    TIERS,
    WINDOWED,
    all_layouts,
    all_tiers,
    filled,
    geometry_of,
    slow,
    tokens_of,
)
from tests.cache.pushing import pushing

TEXT = (
    "The old man walked down to the river in the morning, and the boy went with him. They had "
    "brought bread and a little wine, and they sat under the trees and spoke about the war. It was "
    "a long time ago, said the man, and I do not remember all of it. There were many of us, and we "
    "were young. We thought that the world would be made new by what we did, and that the men who "
    "came after us would know our names. The boy did not answer. He looked at the water, which was "
    "brown and slow, and at the houses on the other side. In the town the bells began to ring, and "
    "the people came out of their doors and stood in the street. It was the first day of the year "
    "in which there was no snow on the hills, and the women said that this was a sign."
)

# Memory


@all_tiers
@all_layouts
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_allocated_bytes_follow_the_formula(tier, layout, dtype):
    for capacity in (3, tier.residual, 3 * tier.residual + 5, 256):
        geometry = geometry_of(tier, layout, dtype=dtype, capacity=capacity)
        shapes = jax.eval_shape(functools.partial(tier.init, geometry, 3))
        assert bytes_of(shapes) == 3 * tier.bytes_per_row(geometry)


@pytest.mark.parametrize(
    "bits, group, expected", [(2, 32, 96), (2, 64, 80), (4, 32, 160), (4, 64, 144)]
)
def test_a_packed_token_takes_the_bytes_of_the_paper(bits, group, expected):
    (tier,) = kivi(bits, group).tiers
    short, long = (Geometry(num_kv_heads=1, head_dim=128, capacity=c) for c in (1024, 2048))
    assert tier.bytes_per_row(long) - tier.bytes_per_row(short) == 1024 * expected


def test_a_window_takes_the_same_bytes_for_any_capacity():
    tier = WINDOWED["three blocks"]
    assert not tier.grows and TIERS["2 bit"].grows
    short, long = (tier.bytes_per_row(geometry_of(tier, capacity=c)) for c in (64, 4096))
    assert short == long


@pytest.mark.parametrize(
    "name, layout",
    [
        *[(name, layout) for name in ("2 bit", "dense") for layout in LAYOUTS],
        ("block", "BKHS"),
        pytest.param("block", "BKSH", marks=slow),
    ],
)
def test_growing_keeps_what_is_stored(name, layout):
    tier = TIERS[name]
    size = 2 * tier.residual
    tokens = tokens_of(1, size + 9)
    geometry = geometry_of(tier, layout, capacity=2 * tier.residual + 3)
    small = filled(tier, geometry, tokens, [size], width=5)
    grown = tier.grow(small, 4 * tier.residual)
    large = filled(
        tier, geometry_of(tier, layout, capacity=4 * tier.residual), tokens, [size], width=5
    )
    assert_same(grown, large)
    assert_same(tier.grow(large, 3), large)


# Accuracy


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_eight_bits_cost_a_trained_model_no_quality():
    """A perplexity within 0.01 of the full cache's (0.001 measured; two bits are 0.12 off)."""
    lm = ji.load("tiny-llama", dtype="float32")
    full, packed = (perplexity(lm, [TEXT], policy) for policy in (None, kivi(8, 32, residual=32)))
    assert full.tokens > 5 * 32 and full.perplexity < 100
    assert abs(packed.perplexity - full.perplexity) < 0.01


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def coarse(x: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """`x` after quantization in groups of 32 along `axis`."""
    return np.asarray(dequantize(*quantize(jnp.asarray(x), bits, 32, axis), 32, axis))


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("rotated", [True, False])
def test_keys_with_outlier_channels_want_groups_per_channel(bits, rotated):
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((1024, 128)).astype(np.float32)
    outliers = rng.choice(128, 6, replace=False)
    keys[:, outliers] += 8 * rng.choice([-1, 1], 6)
    q = rng.standard_normal((64, 128)).astype(np.float32)
    rope = RopeConfig(rotary_dim=128, theta=10000.0)

    def turned(x, positions):
        angles = rotation(rope, jnp.broadcast_to(jnp.asarray(positions), (1, len(x))))
        return np.asarray(rotate(jnp.asarray(x)[None, None], angles))[0, 0]

    where, last = np.arange(1024, dtype=np.int32), np.full(64, 1023, np.int32)

    def weights(axis: int | None) -> np.ndarray:
        k = turned(keys, where) if rotated else keys
        k = k if axis is None else coarse(k, bits, axis)
        return softmax(turned(q, last) @ (k if rotated else turned(k, where)).T / np.sqrt(128))

    channel, token = (relative_error(weights(axis), weights(None)) for axis in (0, 1))
    assert channel < token


def test_values_under_sparse_attention_want_groups_per_token():
    rng = np.random.default_rng(0)
    scale = np.exp(rng.standard_normal((1024, 1, 1)))  # tokens differ in size, channels do not
    values = (scale * rng.standard_normal((1024, 1, 128)))[:, 0].astype(np.float32)
    small = np.argsort(scale[:, 0, 0])[:256]
    weights = np.zeros((16, 1024))
    for row in weights:  # attention to a few of the smaller tokens
        row[rng.choice(small, 4, replace=False)] = 0.25
    exact = weights @ values
    token, channel = (relative_error(weights @ coarse(values, 2, axis), exact) for axis in (1, 0))
    assert token < channel


# Settings


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"residual": 48}, "residual 48 is not a multiple of key_group 32.*fit: .16, 48"),
        ({"residual": 8, "key_group": 8}, "residual 8 is not a multiple of 16.*take 16"),
        ({"key_group": 8}, "key_group 8 is not a multiple of 16, the keys in one word.*take 16"),
        ({"value_group": 24}, "value_group 24 is not a multiple of 16.*take 32"),
        ({"key_bits": 3}, "key_bits must be one of 2, 4, 8, 16; got 3"),
        ({"value_flush": "never"}, "value_flush must be one of sliding, block"),
        ({"scale_dtype": "int8"}, "scale_dtype must be one of float16, bfloat16, float32"),
        ({"residual": 0}, "residual must be a whole number of at least 1"),
        ({"value_grouping": "channel"}, "needs value_flush 'block'"),
        ({"window": 256}, "window needs value_flush 'block'"),
        ({"window": 200, "value_flush": "block"}, "window 200 is not a positive multiple of"),
        (
            {"value_group": 96, "value_flush": "block", "value_grouping": "channel"},
            "multiple of value_group 96",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Kivi(**wrong)


@pytest.mark.parametrize(
    "size, tier, message",
    [
        (8, Kivi(), r"head size 8 .* 2-bit values; value_bits that fit: \[4, 8, 16\]"),
        (80, Kivi(), r"head size 80 .* value_group 32; groups that fit: \[16, 80\]"),
        (48, Kivi(value_group=16, key_grouping="token"), "multiple of key_group 32"),
    ],
)
def test_heads_that_do_not_fit_are_refused_before_compiling(size, tier, message):
    geometry = Geometry(num_kv_heads=1, head_dim=size, capacity=256)
    with pytest.raises(ValueError, match=message):
        tier.init(geometry, 1)
    with pytest.raises(ValueError, match=message):
        tier.check(CONFIGS["llama"], geometry)


def test_the_preset_says_what_it_promises():
    lossless = kivi(value_flush="block", residual=32)
    assert lossless.lossless_under_tree and not lossless.chunk_invariant
    np.testing.assert_array_equal(lossless.horizon(jnp.asarray([0, 5, 32, 63])), [32, 27, 32, 1])
    for lossy in (kivi(), kivi(value_flush="block", flush_order="before")):
        assert not lossy.lossless_under_tree and lossy.horizon(jnp.asarray([0])) is None
    assert kivi(flush_order="before").commit_first and not kivi().commit_first
    assert kivi() == kivi() and hash(kivi()) == hash(kivi()) and kivi() != kivi(4)
    assert kivi(4, key_bits=2).tiers == (Kivi(key_bits=2, value_bits=4),)
    with pytest.raises(ValueError, match="flush_order must be one of .*; got 'never'"):
        kivi(flush_order="never")


# Writes in place


def decode_loop(tier: Kivi, geometry: Geometry, batch: int, fresh: int):
    """A compiled loop that attends to the tier and pushes `fresh` tokens behind a drawn token."""
    heads, size = geometry.num_kv_heads, geometry.head_dim
    spec = AttentionSpec(scale=0.1)

    def step(carry):
        turn, n_in, x, state = carry
        q, q_pos = x[:, :, None], n_in[:, None] + jnp.arange(fresh)

        def mask_fn(k_pos, ok):
            return q_pos[:, None, :, None] - k_pos[:, :, None, :], ok[:, :, None]

        partial = empty_partial(q)
        for segment in tier.segments(state, None, n_in):
            partial = merge(partial, segment.partial(spec, q, q_pos, mask_fn))
        out = finish(partial)[:, :, 0].astype(geometry.dtype)
        drawn = jnp.argmax(out.reshape(batch, -1), axis=-1)
        items = Items(k=jnp.sin(x), v=jnp.cos(x), pos=q_pos[:, None])
        count = jnp.full((batch,), fresh, jnp.int32)
        state, spilled, _ = tier.push(state, None, items, pushing(n_in, count, drawn))
        if spilled is not None:
            out = out + (spilled.k + spilled.v).sum().astype(out.dtype)
        return turn + 1, n_in + fresh, out, state

    def run(state, n_in, x, steps):
        carry = (jnp.int32(0), n_in, x, state)
        return jax.lax.while_loop(lambda carry: carry[0] < steps, step, carry)

    state = jax.eval_shape(functools.partial(tier.init, geometry, batch))
    x = jax.ShapeDtypeStruct((batch, heads, fresh, size), geometry.dtype)
    n_in, steps = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((batch,), ()))
    return state, jax.jit(run, donate_argnums=0).lower(state, n_in, x, steps).compile()


@pytest.mark.parametrize(
    "tier, dtype, fresh",
    [
        pytest.param(Kivi(), "bfloat16", 1, id="bfloat16"),
        pytest.param(Kivi(value_flush="block", window=65536), "float32", 1, id="window"),
        pytest.param(Kivi(), "float32", 4, id="several tokens", marks=slow),
        pytest.param(Kivi(value_flush="block"), "bfloat16", 1, id="block", marks=slow),
        pytest.param(
            Kivi(key_grouping="token", scale_dtype="bfloat16"),
            "float32",
            1,
            id="keys by token",
            marks=slow,
        ),
        pytest.param(Kivi(key_bits=16, value_bits=16), "bfloat16", 1, id="16 bits", marks=slow),
    ],
)
def test_the_decode_loop_copies_nothing_that_is_packed(tier, dtype, fresh):
    geometry = Geometry(num_kv_heads=3, head_dim=64, capacity=65536, dtype=dtype)
    state, executable = decode_loop(tier, geometry, 2, fresh)
    packed = jax.tree.leaves((state.keys, state.values))
    # The tail of R tokens is what a push quantizes: that stages numbers of its size, no more.
    assert hlo.cache_sized_copies(executable, packed) == []
    assert hlo.unaliased_leaves(executable, jax.tree.leaves(state)) == []
    memory = hlo.memory(executable)
    assert memory.alias_bytes >= bytes_of(state)
    staged = 2 * 3 * 64 * 4 * (2 * READ_BLOCK + 8 * tier.residual)
    assert memory.temp_bytes <= staged + (1 << 20)
