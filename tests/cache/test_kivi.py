"""The KIVI tier against lists that grow token by token, its bytes, and its writes in place."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.cache.base import Geometry, Items, bytes_of
from jaxinfer.cache.kivi import READ_BLOCK, Kivi, kivi
from jaxinfer.cache.packed import decode
from jaxinfer.cache.presets import full, per_layer
from jaxinfer.compile import hlo
from jaxinfer.config import RopeConfig
from jaxinfer.models.stack import cache_geometry
from jaxinfer.nn.alibi import mpt_slopes
from jaxinfer.nn.rope import rotate, rotation
from jaxinfer.ops.attention import (
    AttentionSpec,
    empty_partial,
    finish,
    log_sum_exp,
    merge,
)
from jaxinfer.ops.quantize import dequantize, quantize
from tests.cache import layer
from tests.cache.kivi_lists import KiviLists, attention
from tests.cache.layer import Layer, random_qkv
from tests.cache.stepping import Stepper, assert_same, close, quick_jit, row_of
from tests.factories import random_tokens

K, G, H = 2, 2, 32
SCALE = 0.3
SPEC = AttentionSpec(scale=SCALE)
NEVER = jnp.zeros((), jnp.int32)  # an `after` without unknowns
TIERS = {
    "2 bit": Kivi(key_group=16, value_group=16, residual=32),
    "one group": Kivi(key_group=16, residual=16),
    "4 bit": Kivi(key_bits=4, value_bits=4, key_group=8, value_group=8, residual=8),
    "8 bit": Kivi(key_bits=8, value_bits=8, key_group=4, value_group=16, residual=8),
    "mixed": Kivi(key_bits=2, value_bits=8, key_group=16, value_group=8, residual=16),
    "dense keys": Kivi(key_bits=16, value_bits=2, residual=16),
    "dense values": Kivi(key_bits=4, value_bits=16, key_group=8, residual=16),
    "dense": Kivi(key_bits=16, value_bits=16, residual=8),
    "block": Kivi(key_group=16, residual=32, value_flush="block"),
    "float32 scales": Kivi(key_group=16, residual=16, scale_dtype="float32"),
    "keys by token": Kivi(key_grouping="token", residual=16),
    "values by channel": Kivi(
        key_group=16, value_group=16, residual=16, value_flush="block", value_grouping="channel"
    ),
    "both swapped": Kivi(
        key_bits=4,
        value_bits=4,
        value_group=8,
        residual=16,
        value_flush="block",
        key_grouping="token",
        value_grouping="channel",
    ),
}
WINDOWED = {
    "one block": Kivi(
        key_bits=4, value_bits=4, key_group=8, residual=8, value_flush="block", window=8
    ),
    "three blocks": Kivi(
        key_bits=8, value_bits=4, key_group=8, residual=8, value_flush="block", window=24, start=4
    ),
}
LAYOUTS = ("BKHS", "BKSH")
all_tiers = pytest.mark.parametrize("tier", TIERS.values(), ids=TIERS)
all_layouts = pytest.mark.parametrize("layout", LAYOUTS)
slow = pytest.mark.slow
FAST_ON_GPU_LAYOUT = ("2 bit", "dense", "both swapped")
tiers_and_layouts = pytest.mark.parametrize(
    "tier, layout",
    [
        pytest.param(
            tier,
            layout,
            id=f"{name}-{layout}",
            marks=() if layout == "BKHS" or name in FAST_ON_GPU_LAYOUT else slow,
        )
        for name, tier in TIERS.items()
        for layout in LAYOUTS
    ],
)


def geometry_of(tier: Kivi, layout: str = "BKHS", **changes) -> Geometry:
    capacity = 4 * tier.residual + 3 if tier.window is None else 64
    given = {"num_kv_heads": K, "head_dim": H, "capacity": capacity}
    return Geometry(
        **{**given, **changes}, key_layout=layout, block=128 if layout == "BKHS" else None
    )


def tokens_of(
    batch: int, count: int, seed: int = 0, heads: int = K, size: int = H
) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values [B, heads, count, size]."""
    rng = np.random.default_rng(seed)
    k, v = rng.standard_normal((2, batch, heads, count, size)).astype(np.float32)
    return 2 * k + rng.standard_normal((heads, 1, size)).astype(np.float32), v


@quick_jit
def push(tier: Kivi, state, k, v, n_in, count, after=NEVER):
    pos = (n_in[:, None] + jnp.arange(k.shape[2]))[:, None]
    return tier.push(state, None, Items(k=k, v=v, pos=pos), n_in, count, after)


def pushed(tier, state, tokens, n_in, counts, width: int):
    """The state after tokens n_in[b] + [0, counts[b]) of each row, padded to `width` with NaN."""
    batch, heads, _, size = tokens[0].shape
    fresh = np.full((2, batch, heads, width, size), np.nan, np.float32)
    for half, numbers in enumerate(tokens):
        for b, (n, c) in enumerate(zip(n_in, counts, strict=True)):
            fresh[half, b, :, :c] = numbers[b, :, n : n + c]
    n_in, counts = (jnp.asarray(x, jnp.int32) for x in (n_in, counts))
    return push(tier, state, *map(jnp.asarray, fresh), n_in, counts)


def filled(tier, geometry, tokens, lengths, width: int, seed: int | None = None):
    """The state after `lengths[b]` tokens of each row, pushed in pieces of at most `width`, whose
    sizes are drawn if `seed` is given."""
    rng = np.random.default_rng(seed)
    lengths = np.asarray(lengths)
    done = np.zeros_like(lengths)
    state = tier.init(geometry, len(lengths))
    while (done < lengths).any():
        most = np.minimum(lengths - done, width)
        counts = most if seed is None else rng.integers(0, most + 1)
        state, _, _ = pushed(tier, state, tokens, done, counts, width)
        done = done + counts
    return state


def lists_of(tier, tokens, row: int, length: int) -> KiviLists:
    lists = KiviLists(tier)
    for t in range(length):
        lists.append(tokens[0][row, :, t], tokens[1][row, :, t])
    return lists


def ragged(tier: Kivi) -> list[int]:
    r = tier.residual
    longer = np.random.default_rng(r).integers(2 * r + 1, 4 * r, 2).tolist()
    return [0, 1, r - 1, r, r + 1, 2 * r, min(tier.key_group, 2 * r), *longer]


@functools.partial(quick_jit, static_argnums=(0, 4))
def read(tier: Kivi, state, n_in, q, spec=SPEC):
    """(partial over all segments, key mass) of q [B, K, G, T, H] behind the stored tokens."""
    q_pos = tier.start + n_in[:, None] + jnp.arange(q.shape[3])

    def see(k_pos, ok):
        distance = q_pos[:, None, :, None] - k_pos[:, :, None, :]
        visible = ok[:, :, None] & (distance > 0)
        if spec.window is not None:
            visible &= distance < spec.window
        return distance, visible

    segments = tier.segments(state, None, n_in)
    partials = [segment.partial(spec, q, q_pos, see) for segment in segments]
    partial = functools.reduce(merge, partials, empty_partial(q))
    lse = log_sum_exp(partial)
    mass = [segment.key_mass(spec, q, q_pos, see, lse) for segment in segments]
    return partial, jnp.concatenate(mass, axis=-1)


def queries(batch: int, size: int = 1) -> jax.Array:
    return jax.random.normal(jax.random.key(7), (batch, K, G, size, H))


# What is stored


@tiers_and_layouts
def test_attention_equals_that_over_growing_lists(tier, layout):
    lengths = ragged(tier)
    tokens = tokens_of(len(lengths), max(lengths))
    state = filled(tier, geometry_of(tier, layout), tokens, lengths, width=5, seed=1)
    q = queries(len(lengths))
    partial, mass = read(tier, state, jnp.asarray(lengths), q)
    out = np.asarray(finish(partial))
    for row, length in enumerate(lengths):
        if length == 0:
            assert not out[row].any() and not np.asarray(mass[row]).any()
            continue
        lists = lists_of(tier, tokens, row, length)
        expected = attention(np.asarray(q[row, :, :, 0]), lists.keys(), lists.values(), SCALE)
        np.testing.assert_allclose(out[row, :, :, 0], expected, rtol=0, atol=2e-6)
        np.testing.assert_allclose(mass[row].sum(axis=-1), G, rtol=1e-5)


@tiers_and_layouts
def test_packed_tokens_equal_those_of_growing_lists(tier, layout):
    lengths = ragged(tier)
    tokens = tokens_of(len(lengths), max(lengths))
    state = filled(tier, geometry_of(tier, layout), tokens, lengths, width=5, seed=1)
    keys, values = np.asarray(decode(state.keys)), np.asarray(decode(state.values))
    keys = keys.swapaxes(2, 3) if layout == "BKHS" else keys
    for row, length in enumerate(lengths):
        lists = lists_of(tier, tokens, row, length)
        for found, expected in ((keys, lists.packed_k), (values, lists.packed_v)):
            found = found[row].swapaxes(0, 1)
            size = len(expected)
            # products of codes and float32 scales may be rounded once less in compiled code
            close = np.testing.assert_array_equal
            if tier.scale_dtype == "float32":
                close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
            close(found[:size], np.array(expected).reshape(size, K, H))
            assert not found[size:].any()


@all_tiers
@pytest.mark.parametrize("seed", [None, 3])
def test_every_split_of_a_row_gives_the_same_bits(tier, seed):
    lengths = ragged(tier)
    tokens = tokens_of(len(lengths), max(lengths))
    geometry = geometry_of(tier)
    whole = filled(tier, geometry, tokens, lengths, width=max(lengths))
    pieces = filled(tier, geometry, tokens, lengths, width=5, seed=seed)
    if tier.scale_dtype == "float32":  # see above: the tail's dequantized keys
        near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
        near(pieces.tail.k, whole.tail.k)
        pieces = replace(pieces, tail=replace(pieces.tail, k=whole.tail.k))
    assert_same(pieces, whole)


def test_every_two_part_split_gives_the_same_bits():
    tier, length = TIERS["4 bit"], 25  # three flushes
    tokens = tuple(np.repeat(x, length + 1, axis=0) for x in tokens_of(1, length))
    geometry = geometry_of(tier)
    first = np.arange(length + 1)  # row b gets b tokens, then the rest
    state, _, _ = pushed(tier, tier.init(geometry, length + 1), tokens, 0 * first, first, length)
    state, _, _ = pushed(tier, state, tokens, first, length - first, length)
    for row in first[1:]:
        assert_same(row_of(state, row), row_of(state, 0))


@pytest.mark.parametrize("name", ["2 bit", "block"])
def test_history_is_never_quantized_again(name):
    tier = TIERS[name]
    r = tier.residual
    tokens = tokens_of(1, 4 * r)
    before = filled(tier, geometry_of(tier), tokens, [3 * r], width=5)
    after, _, _ = pushed(tier, before, tokens, [3 * r], [r], r)
    stored = {"keys": 3 * r, "values": int(tier.packed_tokens(jnp.asarray([3 * r]))[0])}
    for half, count in stored.items():
        old, new = (getattr(state, half).span(0, count) for state in (before, after))
        assert np.asarray(old.words).any()
        assert_same(old, new)


def test_tokens_beyond_the_capacity_overwrite_nothing():
    tier = TIERS["4 bit"]
    tokens = tokens_of(1, 40)
    geometry = geometry_of(tier, capacity=19)
    state = filled(tier, geometry, tokens, [16], width=8)
    after, _, _ = pushed(tier, state, tokens, [16], [24], 24)
    assert_same(after.keys, state.keys)


@all_tiers
def test_a_row_that_gets_nothing_keeps_every_bit(tier):
    lengths = ragged(tier)
    tokens = tokens_of(len(lengths), max(lengths))
    state = filled(tier, geometry_of(tier), tokens, lengths, width=5)
    after, _, _ = pushed(tier, state, tokens, lengths, [0] * len(lengths), 5)
    assert_same(after, state)


@pytest.mark.parametrize("name", ["2 bit", "block"])
def test_a_row_alone_equals_itself_in_a_batch(name):
    tier = TIERS[name]
    lengths = ragged(tier)
    tokens = tokens_of(len(lengths), max(lengths))
    state = filled(tier, geometry_of(tier), tokens, lengths, width=5)
    for row in (1, 5):
        own = tuple(x[row : row + 1] for x in tokens)
        alone = filled(tier, geometry_of(tier), own, lengths[row : row + 1], width=5)
        assert_same(row_of(state, row), row_of(alone, 0))


@pytest.mark.parametrize("tier", [TIERS["2 bit"], TIERS["block"]], ids=["sliding", "block"])
def test_nothing_is_quantized_before_the_residual_is_full(tier):
    length = tier.residual - 1
    tokens = tokens_of(1, length)
    state = filled(tier, geometry_of(tier), tokens, [length], width=5)
    assert not np.asarray(state.keys.words).any() and not np.asarray(state.values.words).any()
    q = queries(1)
    out = finish(read(tier, state, jnp.asarray([length]), q)[0])
    exact = (x[0].swapaxes(0, 1) for x in tokens)
    expected = attention(np.asarray(q[0, :, :, 0]), *exact, SCALE)
    np.testing.assert_allclose(out[0, :, :, 0], expected, rtol=0, atol=2e-6)


@all_layouts
def test_16_bits_store_the_numbers_themselves(layout):
    tier = TIERS["dense"]
    tokens = tokens_of(1, 2 * tier.residual)
    geometry = geometry_of(tier, layout, capacity=2 * tier.residual)
    state = filled(tier, geometry, tokens, [2 * tier.residual], width=5)
    keys = np.asarray(decode(state.keys))
    keys = keys.swapaxes(2, 3) if layout == "BKHS" else keys
    np.testing.assert_array_equal(keys, tokens[0])
    np.testing.assert_array_equal(
        decode(state.values)[:, :, : tier.residual], tokens[1][:, :, : tier.residual]
    )


def test_16_bits_give_the_attention_of_the_full_cache():
    q, k, v = random_qkv(40)
    out = Layer(kivi(16, residual=8)).stream(q, k, v)
    np.testing.assert_allclose(out, Layer(full()).stream(q, k, v), rtol=0, atol=1e-6)


@all_layouts
@pytest.mark.parametrize("flush", ["sliding", "block"])
def test_bfloat16_tails_round_tokens_before_they_are_quantized(layout, flush):
    tier = Kivi(key_group=16, residual=16, value_flush=flush, scale_dtype="bfloat16")
    geometry = geometry_of(tier, layout, dtype="bfloat16")
    tokens = tokens_of(2, 35)
    rounded = tuple(np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)) for x in tokens)
    state = filled(tier, geometry, tokens, [35, 20], width=6)
    assert_same(state, filled(tier, geometry, rounded, [35, 20], width=35))
    assert state.tail.k.dtype == (jnp.uint16 if layout == "BKHS" else jnp.bfloat16)


# Order of attention and flush


@pytest.mark.parametrize("order", ["after", "before"])
@pytest.mark.parametrize("flush", ["sliding", "block"])
def test_attention_follows_the_flush_order(order, flush):
    tier = Kivi(key_bits=4, value_bits=4, key_group=8, value_group=8, residual=8, value_flush=flush)
    policy = kivi(4, 8, 8, value_flush=flush, flush_order=order)
    q, k, v = random_qkv(19)
    out = Layer(policy, rope=None).stream(q, k, v)
    lists = KiviLists(tier)
    for t in range(19):
        own_k, own_v = (x[0, :, t].astype(np.float32) for x in (k, v))
        if order == "after":
            stored = (lists.keys(), lists.values()) if t else (np.zeros((0, *own_k.shape)),) * 2
            keys, values = (
                np.concatenate([x, y[None]]) for x, y in zip(stored, (own_k, own_v), strict=True)
            )
        lists.append(own_k, own_v)
        if order == "before":
            keys, values = lists.keys(), lists.values()
        grouped = q[0, :, t].reshape(layer.K, layer.G, layer.H)
        expected = attention(grouped, keys, values, layer.SPEC.scale)
        np.testing.assert_allclose(out[0, :, t], expected.reshape(-1, layer.H), rtol=0, atol=1e-5)


@pytest.mark.parametrize("order", ["after", "before"])
def test_a_prompt_is_read_in_full_precision_and_then_stored(order):
    stepper = Stepper("llama", kivi(4, 8, 8, flush_order=order))
    tokens = random_tokens(1, 24)
    cache, logits = stepper.step(stepper.cache(), tokens[:, :23], size=23)
    plain = stepper.plain(tokens)
    np.testing.assert_allclose(logits, plain[:, :23], **close())
    _, following = stepper.step(cache, tokens[:, 23:], size=1)
    assert np.abs(following - plain[:, 23:]).max() > 10 * close()["atol"]


@pytest.mark.parametrize("prompt, is_exact", [(7, True), (8, False)])
def test_a_prompt_that_fills_the_residual_is_no_longer_exact(prompt, is_exact):
    stepper = Stepper("llama", kivi(4, 8, 8))
    tokens = random_tokens(1, prompt + 1)
    cache, _ = stepper.step(stepper.cache(), tokens[:, :prompt], size=8)
    _, logits = stepper.step(cache, tokens[:, prompt:], size=8)
    difference = np.abs(logits - stepper.plain(tokens)[:, prompt:]).max()
    assert (difference <= close()["atol"]) == is_exact


def test_every_layer_may_have_its_own_bits():
    bits = (8, 4)
    mixed = Stepper("llama", per_layer([kivi(b, 8, 8) for b in bits]))
    tokens = random_tokens(2, 24)
    cache, _ = mixed.run(mixed.cache(2), tokens, (8, 8, 8))
    for layer_index, b in enumerate(bits):
        geometry = cache_geometry(mixed.cfg, 64)
        (tier,) = kivi(b, 8, 8).tiers
        assert bytes_of(cache.layers[layer_index]) == 2 * tier.bytes_per_row(geometry)
    same = Stepper("llama", kivi(bits[0], 8, 8))
    first, _ = same.run(same.cache(2), tokens, (8, 8, 8))
    assert_same(cache.layers[0], first.layers[0])  # the first layer's inputs are the embeddings


# Reading


@pytest.mark.parametrize(
    "layout, window", [("BKHS", None), ("BKHS", 20), pytest.param("BKSH", 20, marks=slow)]
)
def test_reading_in_blocks_equals_reading_at_once(layout, window):
    tier = TIERS["4 bit"]
    lengths = [0, 9, 44, 83]
    tokens = tokens_of(4, 83)
    state = filled(tier, geometry_of(tier, layout, capacity=88), tokens, lengths, width=83)
    spec = AttentionSpec(scale=SCALE, window=window, softcap=9.0, slopes=mpt_slopes(K * G))
    n_in, q = jnp.asarray(lengths), queries(4, 3)
    whole, whole_mass = read(tier, replace(state, block=None), n_in, q, spec)
    for block in (24, 32):  # 80 packed slots: the last block overlaps the one before
        blocked, mass = read(tier, replace(state, block=block), n_in, q, spec)
        np.testing.assert_allclose(finish(blocked), finish(whole), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(mass, whole_mass, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "group, size, layout",
    [(1, 96, "BKHS"), (7, 80, "BKHS"), (8, 256, "BKHS"), (4, 128, "BKSH")],
)
def test_any_group_of_queries_and_head_size_reads_what_is_stored(group, size, layout):
    tier = Kivi(key_group=16, value_group=16, residual=16)
    lengths = [21, 43, 16]
    tokens = tokens_of(3, 43, heads=1, size=size)
    geometry = geometry_of(tier, layout, num_kv_heads=1, head_dim=size)
    state = filled(tier, geometry, tokens, lengths, width=43)
    q = (H / size) ** 0.5 * jax.random.normal(jax.random.key(3), (3, 1, group, 1, size))
    out = np.asarray(finish(read(tier, state, jnp.asarray(lengths), q)[0]))
    for row, length in enumerate(lengths):
        lists = lists_of(tier, tokens, row, length)
        expected = attention(np.asarray(q[row, :, :, 0]), lists.keys(), lists.values(), SCALE)
        # scores reach 30, whose rounding in float32 is 2e-6
        np.testing.assert_allclose(out[row, :, :, 0], expected, rtol=0, atol=2e-5)


def test_only_blocks_with_live_slots_are_read():
    tier = TIERS["4 bit"]
    lengths = [9, 24]
    state = filled(tier, geometry_of(tier, capacity=72), tokens_of(2, 24), lengths, width=8)
    scale = state.values.scale.at[:, :, 16:].set(jnp.nan)  # reaches the output through 0 * NaN
    dirty = replace(state, values=replace(state.values, scale=scale), block=16)
    partial, _ = read(tier, dirty, jnp.asarray(lengths), queries(2))
    assert np.isfinite(finish(partial)).all()


# The ring of blocks


@pytest.mark.parametrize(
    "name, layout, width",
    [
        ("three blocks", "BKHS", 1),
        ("three blocks", "BKHS", 40),
        ("three blocks", "BKSH", 5),
        ("one block", "BKHS", 40),
        pytest.param("one block", "BKHS", 1, marks=slow),
        pytest.param("one block", "BKSH", 5, marks=slow),
    ],
)
def test_the_ring_keeps_and_spills_what_the_lists_do(name, layout, width):
    tier = WINDOWED[name]
    lengths = np.array([70, 33, 8, 0])
    tokens = tokens_of(4, 70)
    state = tier.init(geometry_of(tier, layout), 4)
    spilled = [[] for _ in lengths]
    done = np.zeros_like(lengths)
    while (done < lengths).any():
        counts = np.minimum(lengths - done, width)
        state, items, gone = pushed(tier, state, tokens, done, counts, width)
        for row, count in enumerate(np.asarray(gone)):
            for i in range(count):
                k, v = np.asarray(items.k[row, :, i]), np.asarray(items.v[row, :, i])
                spilled[row].append((int(items.pos[row, 0, i]), k, v))
        done = done + counts
    n_in, q = jnp.asarray(lengths), queries(4)
    out = np.asarray(finish(read(tier, state, n_in, q)[0]))
    for row, length in enumerate(lengths):
        lists = lists_of(tier, tokens, row, length)
        assert len(spilled[row]) == len(lists.spilled) == int(tier.passed(n_in)[row])
        assert int(tier.kept(n_in)[row]) == length - len(lists.spilled)
        for (pos, k, v), (token, key, value) in zip(spilled[row], lists.spilled, strict=True):
            assert pos == tier.start + token
            np.testing.assert_array_equal(k, key)
            np.testing.assert_array_equal(v, value)
        if length:
            expected = attention(np.asarray(q[row, :, :, 0]), lists.keys(), lists.values(), SCALE)
            np.testing.assert_allclose(out[row, :, :, 0], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("tier", WINDOWED.values(), ids=WINDOWED)
def test_positions_in_the_ring_are_those_of_the_text(tier):
    lengths = jnp.asarray([0, 7, 8, 31, 64, 100])
    state = tier.init(geometry_of(tier), len(lengths))
    for row, length in enumerate(lengths.tolist()):
        seen = []
        for segment in tier.segments(state, None, lengths):
            pos, ok = np.asarray(segment.pos)[row, 0], np.asarray(segment.ok)[row, 0]
            seen += pos[ok].tolist()
        gone = int(tier.passed(lengths)[row])
        assert sorted(seen) == list(range(tier.start + gone, tier.start + length))


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


@all_layouts
@pytest.mark.parametrize("name", ["2 bit", "block", "dense"])
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
        ({"residual": 0}, "residual must be at least 1"),
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
        tier.check(None, geometry)


def test_the_preset_says_what_it_promises():
    lossless = kivi(value_flush="block", residual=32)
    assert lossless.lossless_under_tree and not lossless.chunk_invariant
    np.testing.assert_array_equal(lossless.horizon(jnp.asarray([0, 5, 32, 63])), [32, 27, 32, 1])
    for lossy in (kivi(), kivi(value_flush="block", flush_order="before")):
        assert not lossy.lossless_under_tree and lossy.horizon(jnp.asarray([0])) is None
    assert kivi(flush_order="before").commit_first and not kivi().commit_first
    assert kivi() == kivi() and hash(kivi()) == hash(kivi()) and kivi() != kivi(4)
    assert kivi(4, key_bits=2).tiers == (Kivi(key_bits=2, value_bits=4),)
    with pytest.raises(ValueError, match="flush_order must be 'after' or 'before', got 'never'"):
        kivi(flush_order="never")


# Writes in place


def decode_loop(tier: Kivi, geometry: Geometry, batch: int, fresh: int):
    """A compiled loop that attends to the tier and pushes `fresh` tokens behind a drawn token."""
    heads, size = geometry.num_kv_heads, geometry.head_dim
    spec = AttentionSpec(scale=0.1)

    def step(carry):
        turn, n_in, x, state = carry
        q, q_pos = x[:, :, None], n_in[:, None] + jnp.arange(fresh)

        def see(k_pos, ok):
            return q_pos[:, None, :, None] - k_pos[:, :, None, :], ok[:, :, None]

        partial = empty_partial(q)
        for segment in tier.segments(state, None, n_in):
            partial = merge(partial, segment.partial(spec, q, q_pos, see))
        out = finish(partial)[:, :, 0].astype(geometry.dtype)
        drawn = jnp.argmax(out.reshape(batch, -1), axis=-1)
        items = Items(k=jnp.sin(x), v=jnp.cos(x), pos=q_pos[:, None])
        count = jnp.full((batch,), fresh, jnp.int32)
        state, spilled, _ = tier.push(state, None, items, n_in, count, drawn)
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
