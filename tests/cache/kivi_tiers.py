"""Tiers of KIVI in many settings, filled with random tokens, for its tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.cache.base import Geometry, Items
from jaxinfer.cache.kivi import Kivi
from jaxinfer.ops.attention import (
    AttentionSpec,
    empty_partial,
    log_sum_exp,
    merge,
)
from jaxinfer.runtime.backend import Backend
from jaxinfer.testing.quick import quick_jit
from tests.cache.kivi_lists import KiviLists
from tests.cache.pushing import pushing

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
        **{**given, **changes},
        backend=Backend(layout=layout, block=128 if layout == "BKHS" else None),
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
    return tier.push(state, None, Items(k=k, v=v, pos=pos), pushing(n_in, count, after))


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
    """(partial over all segments, weights of keys) of q [B, K, G, T, H] after the stored tokens."""
    q_pos = tier.start + n_in[:, None] + jnp.arange(q.shape[3])

    def mask_fn(k_pos, ok):
        distance = q_pos[:, None, :, None] - k_pos[:, :, None, :]
        visible = ok[:, :, None] & (distance > 0)
        if spec.window is not None:
            visible &= distance < spec.window
        return distance, visible

    segments = tier.segments(state, None, n_in)
    partials = [segment.partial(spec, q, q_pos, mask_fn) for segment in segments]
    partial = functools.reduce(merge, partials, empty_partial(q))
    lse = log_sum_exp(partial)
    attn_weight = [segment.key_weights(spec, q, q_pos, mask_fn, lse) for segment in segments]
    return partial, jnp.concatenate(attn_weight, axis=-1)


def queries(batch: int, size: int = 1) -> jax.Array:
    return jax.random.normal(jax.random.key(7), (batch, K, G, size, H))
