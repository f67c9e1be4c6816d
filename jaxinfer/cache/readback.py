"""The keys and values of a text as its cache gives them back, by position.

It asks as attention does, through `Segment.partial`, and so of any policy: a query that sees one
position only gets that token's value, and its score by a unit vector is one channel of the key. A
key is in the form in which it is stored, rotated by its position in the text.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxinfer.cache.attend import stored_segments
from jaxinfer.cache.policy import Policy
from jaxinfer.ops.attention import NEGATIVE, AttentionSpec, Partial, finish, merge
from jaxinfer.typing import Leaf, Params

POSITIONS = 32  # that are asked for at a time


class Stored(NamedTuple):
    """What a cache holds of the tokens at positions 0 to P - 1, zeros where it holds nothing."""

    k: Leaf  # [B, K, P, H]
    v: Leaf  # [B, K, P, H]
    kept: Leaf  # bool[B, K, P]


def stored_by_position(
    policy: Policy,
    state: tuple[Leaf, ...],
    aux: Params | None,
    length: Array,
    shape: tuple[int, int],
    positions: int,
) -> Stored:
    """What a layer's tiers give back of a text; a low-rank state of evicted tokens gives nothing.

    Args:
      policy: of the layer, with its `state` and learned parameters `aux`.
      length: tokens that were committed, i32[B].
      shape: key/value heads K and channels H.
      positions: P.
    """
    spec = AttentionSpec(scale=1.0)
    by_tier = stored_segments(policy, spec, state, aux, length, None)
    segments = [one for tier in by_tier for one in tier if one.holds_tokens]
    heads, size = shape
    count = -(-positions // POSITIONS)
    # One query of each group for each channel.
    unit = jnp.broadcast_to(
        jnp.eye(size)[None, None, :, None], (len(length), heads, size, POSITIONS, size)
    )

    def ask(first: Array) -> Stored:
        wanted = first + jnp.arange(POSITIONS, dtype=jnp.int32)
        there = jnp.broadcast_to(wanted, (len(length), POSITIONS))

        def mask_fn(k_pos: Array, ok: Array) -> tuple[Array, Array]:
            ok = ok if ok.ndim == 4 else ok[:, :, None]
            distance = wanted[:, None] - k_pos[:, :, None]
            return distance, ok & (distance == 0)

        found: Partial | None = None
        for segment in segments:
            new = segment.partial(spec, unit, there, mask_fn)
            found = new if found is None else merge(found, new)
        assert found is not None
        kept = found.max[:, :, 0] > NEGATIVE / 2
        key = jnp.where(kept[:, :, None], found.max, 0).swapaxes(2, 3)
        return Stored(key, finish(found)[:, :, 0], kept)

    with jax.default_matmul_precision("highest"):
        blocks = jax.lax.map(ask, jnp.arange(count, dtype=jnp.int32) * POSITIONS)

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 2)
        return x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, :positions]

    return Stored(*map(join, blocks))
