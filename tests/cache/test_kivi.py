"""The KIVI tier against lists that grow token by token: what is stored, read and spilled."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.cache.base import bytes_of
from jaxinfer.cache.kivi import Kivi
from jaxinfer.cache.kivi_preset import kivi
from jaxinfer.cache.packed import decode
from jaxinfer.cache.presets import full, per_layer
from jaxinfer.models.stack import cache_geometry
from jaxinfer.nn.alibi import mpt_slopes
from jaxinfer.ops.attention import (
    AttentionSpec,
    finish,
)
from jaxinfer.testing.compare import assert_same, close, row_of
from jaxinfer.testing.stepper import Stepper
from tests.cache import layer
from tests.cache.kivi_lists import KiviLists, attention
from tests.cache.kivi_tiers import (
    SCALE,
    TIERS,
    WINDOWED,
    G,
    H,
    K,
    all_layouts,
    all_tiers,
    filled,
    geometry_of,
    lists_of,
    pushed,
    queries,
    ragged,
    read,
    slow,
    tiers_and_layouts,
    tokens_of,
)
from tests.cache.layer import Layer, random_qkv
from tests.factories import random_tokens

# What is stored


@tiers_and_layouts
def test_attention_equals_that_over_growing_lists(tier, layout):
    lengths = ragged(tier)
    tokens = tokens_of(len(lengths), max(lengths))
    state = filled(tier, geometry_of(tier, layout), tokens, lengths, width=5, seed=1)
    q = queries(len(lengths))
    partial, attn_weight = read(tier, state, jnp.asarray(lengths), q)
    out = np.asarray(finish(partial))
    for row, length in enumerate(lengths):
        if length == 0:
            assert not out[row].any() and not np.asarray(attn_weight[row]).any()
            continue
        lists = lists_of(tier, tokens, row, length)
        expected = attention(np.asarray(q[row, :, :, 0]), lists.keys(), lists.values(), SCALE)
        np.testing.assert_allclose(out[row, :, :, 0], expected, rtol=0, atol=2e-6)
        np.testing.assert_allclose(attn_weight[row].sum(axis=-1), G, rtol=1e-5)


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
    whole, whole_weights = read(tier, replace(state, block=None), n_in, q, spec)
    for block in (24, 32):  # 80 packed slots: the last block overlaps the one before
        blocked, attn_weight = read(tier, replace(state, block=block), n_in, q, spec)
        np.testing.assert_allclose(finish(blocked), finish(whole), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(attn_weight, whole_weights, rtol=1e-5, atol=1e-6)


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
