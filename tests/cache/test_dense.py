"""The dense tier: blocked reads, what it stores where, and writes that never leave their place."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.cache.base import Geometry, Items, write_index
from jaxinfer.cache.dense import Dense
from jaxinfer.cache.presets import full, per_layer, resolve
from jaxinfer.cache.slots import load, storage_dtype, store
from jaxinfer.models.stack import init_cache
from jaxinfer.nn.alibi import mpt_slopes
from jaxinfer.ops.attention import AttentionSpec, finish, log_sum_exp
from jaxinfer.runtime.backend import Backend
from jaxinfer.testing.compare import close
from jaxinfer.testing.stepper import Stepper
from tests.cache.pushing import pushing
from tests.factories import random_tokens

B, K, G, T, H = 3, 2, 2, 2, 4
NEVER = jnp.zeros((), jnp.int32)  # an `after` without unknowns


def items_of(count: int, seed: int = 0, batch: int = B) -> Items:
    keys = jax.random.split(jax.random.key(seed), 2)
    k, v = (jax.random.normal(key, (batch, K, count, H)) for key in keys)
    return Items(k=k, v=v, pos=jnp.broadcast_to(jnp.arange(count), (batch, 1, count)))


def filled(geometry: Geometry, lengths: list[int]):
    """The state after `lengths[b]` tokens and those tokens."""
    items = items_of(max(lengths), batch=len(lengths))
    count = jnp.asarray(lengths, jnp.int32)
    tier = Dense()
    state = tier.init(geometry, len(lengths))
    state, _, _ = tier.push(state, None, items, pushing(jnp.zeros_like(count), count, NEVER))
    return state, items


def attend(state, lengths, spec, block):
    """(output, attention weight of keys) of T queries per row behind the stored tokens."""
    n_in = jnp.asarray(lengths, jnp.int32)
    (segment,) = Dense().segments(
        replace(state, backend=replace(state.backend, block=block)), None, n_in
    )
    q = jax.random.normal(jax.random.key(9), (len(lengths), K, G, T, H))
    q_pos = n_in[:, None] + jnp.arange(T)

    def mask_fn(k_pos, ok):
        distance = q_pos[:, None, :, None] - k_pos[:, :, None, :]
        visible = ok[:, :, None] & (distance >= 0)
        if spec.window is not None:
            visible &= distance < spec.window
        return distance, visible

    partial = segment.partial(spec, q, q_pos, mask_fn)
    return finish(partial), segment.key_weights(spec, q, q_pos, mask_fn, log_sum_exp(partial))


@pytest.mark.parametrize("layout", ["BKHS", "BKSH"])
@pytest.mark.parametrize(
    "lengths", [[0, 0, 0], [1, 8, 7], [8, 9, 0], [17, 19, 16], [19, 19, 19]], ids=str
)
@pytest.mark.parametrize("window", [None, 5])
def test_reading_in_blocks_equals_reading_at_once(layout, lengths, window):
    # capacity 19 with blocks of 8: the last block overlaps the one before
    geometry = Geometry(num_kv_heads=K, head_dim=H, capacity=19, backend=Backend(layout=layout))
    state, _ = filled(geometry, lengths)
    spec = AttentionSpec(scale=0.5, window=window, slopes=mpt_slopes(K * G))
    whole, _ = attend(state, lengths, spec, None)
    for block in (8, 19, 64):
        blocked, _ = attend(state, lengths, spec, block)
        np.testing.assert_allclose(blocked, whole, rtol=1e-5, atol=1e-6)


def test_only_blocks_with_live_slots_are_read():
    # NaN in a dead block would reach the output through 0 * NaN
    geometry = Geometry(num_kv_heads=K, head_dim=H, capacity=32)
    state, _ = filled(geometry, [3, 9, 5])
    dirty = replace(state, v=state.v.at[:, :, 16:].set(jnp.nan))
    out, _ = attend(dirty, [3, 9, 5], AttentionSpec(scale=0.5), 8)
    assert np.isfinite(out).all()


def test_blocks_before_every_window_are_not_read():
    geometry = Geometry(num_kv_heads=K, head_dim=H, capacity=32)
    state, _ = filled(geometry, [30, 29, 31])
    dirty = replace(state, v=state.v.at[:, :, :16].set(jnp.nan))
    out, _ = attend(dirty, [30, 29, 31], AttentionSpec(scale=0.5, window=6), 8)
    assert np.isfinite(out).all()


@pytest.mark.parametrize("model", ["llama", "mpt", "sliding"])
def test_a_capacity_over_several_blocks_equals_the_forward_without_a_cache(model):
    stepper = Stepper(model, full())
    block = Backend.of(platform="cpu").block
    first, capacity = 2 * block - 7, 5 * block // 2  # the last block is half inside
    tokens = random_tokens(2, capacity, seed=3)
    expected = stepper.plain(tokens)
    cache, _ = stepper.step(stepper.cache(2, capacity), tokens[:, :first], [first, 40], size=first)
    for sizes in ([4, 1], [8, 8], [1, 8], [8, 0], [8, 8]):  # over the border of a block
        at = np.asarray(cache.length)
        pieces = np.stack([tokens[row, at[row] : at[row] + 8] for row in range(2)])
        cache, found = stepper.step(cache, pieces, sizes)
        for row in range(2):
            seen = slice(at[row], at[row] + sizes[row])
            np.testing.assert_allclose(found[row, : sizes[row]], expected[row, seen], **close())


@pytest.mark.parametrize("layout", ["BKHS", "BKSH"])
def test_token_t_sits_in_slot_t(layout):
    geometry = Geometry(num_kv_heads=K, head_dim=H, capacity=12, backend=Backend(layout=layout))
    state, items = filled(geometry, [9, 4, 0])
    keys = state.k.transpose(0, 1, 3, 2) if layout == "BKHS" else state.k
    for row, length in enumerate([9, 4, 0]):
        np.testing.assert_array_equal(keys[row, :, :length], items.k[row, :, :length])
        np.testing.assert_array_equal(state.v[row, :, :length], items.v[row, :, :length])
        assert not state.v[row, :, length:].any()


@pytest.mark.parametrize("layout", ["BKHS", "BKSH"])
def test_writes_beyond_the_capacity_are_dropped_and_never_wrap(layout):
    geometry = Geometry(num_kv_heads=K, head_dim=H, capacity=8, backend=Backend(layout=layout))
    tier, more = Dense(), items_of(6, seed=1)
    state, _ = filled(geometry, [5, 8, 8])
    count = jnp.asarray([6, 6, 0], jnp.int32)
    after, _, _ = tier.push(
        state, None, more, pushing(jnp.asarray([5, 8, 20], jnp.int32), count, NEVER)
    )
    np.testing.assert_array_equal(after.v[0, :, :5], state.v[0, :, :5])
    np.testing.assert_array_equal(after.v[0, :, 5:], more.v[0, :, :3])
    for row in (1, 2):
        np.testing.assert_array_equal(after.v[row], state.v[row])
        np.testing.assert_array_equal(after.k[row], state.k[row])


@pytest.mark.parametrize(
    "after",
    [jnp.int32(3), jnp.array([-1, 2]), jnp.array([1.0, jnp.nan]), jnp.float32(jnp.inf)],
    ids=["token", "negative", "nan", "inf"],
)
def test_the_write_index_never_depends_on_the_value_of_its_guard(after):
    index = jnp.asarray([0, 3, 7, 8])
    np.testing.assert_array_equal(write_index(index, 8, after), index)


def test_bfloat16_is_kept_as_bits_on_the_cpu_only():
    kind = {"num_kv_heads": K, "head_dim": H, "capacity": 8, "dtype": "bfloat16"}
    assert storage_dtype(Geometry(**kind, backend=Backend(layout="BKHS"))) == jnp.uint16
    assert storage_dtype(Geometry(**kind, backend=Backend(layout="BKSH"))) == jnp.bfloat16
    assert storage_dtype(Geometry(**{**kind, "dtype": "float32"})) == jnp.float32


def test_stored_bits_read_back_as_the_rounded_numbers():
    x = jnp.asarray([0.0, -0.0, 1.5, -3.1415927, 1e30, jnp.inf, -jnp.inf])
    back = load(store(x, jnp.dtype("uint16")))
    np.testing.assert_array_equal(back, x.astype(jnp.bfloat16))
    assert jnp.isnan(load(store(jnp.asarray(jnp.nan), jnp.dtype("uint16"))))


def test_the_geometry_follows_the_back_end():
    cpu, gpu = (Backend.of(platform=name) for name in ("cpu", "gpu"))
    assert cpu.layout == "BKHS" and cpu.block is not None and cpu.block > 0
    assert (gpu.layout, gpu.block) == ("BKSH", None)


def test_attention_weight_of_stored_keys_equals_the_probabilities():
    geometry = Geometry(num_kv_heads=K, head_dim=H, capacity=19)
    lengths = [7, 19, 1]
    state, items = filled(geometry, lengths)
    out, attn_weight = attend(state, lengths, AttentionSpec(scale=0.5), 8)
    np.testing.assert_allclose(attn_weight.sum(axis=-1), G, rtol=1e-5)
    assert attn_weight.shape == (B, K, T, 19) and out.shape == (B, K, G, T, H)
    assert not attn_weight[0, :, :, 7:].any()


def test_one_policy_per_layer_is_checked():
    stepper = Stepper("llama", full())
    with pytest.raises(ValueError, match="got 3 policies for 2 layers"):
        init_cache(stepper.cfg, stepper.params, per_layer([full()] * 3), 1, 64)


def test_policies_resolve_from_names_mappings_and_none():
    for given in (None, "full", {"name": "full"}, full()):
        assert resolve(given) == full()


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("fulll", "unknown cache policy 'fulll'; did you mean 'full'. known policies: full, kivi"),
        ({"bits": 2}, "unknown cache policy None"),
        (
            {"name": "full", "bits": 2},
            "policy 'full' does not take the argument 'bits'; it takes none",
        ),
    ],
)
def test_unknown_policies_and_arguments_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        resolve(wrong)
