"""A decode step's write into a quantized cache (KIVI, arXiv 2402.02750, Algorithm 1), in place.

The newest R tokens of a row lie unquantized in a tail, token t in slot t mod R. One launch puts a
row's new token there, quantizes the value that leaves the tail, and where the token completes a
block of R keys those too; XLA would launch about eleven kernels in every step, though a block is
complete only once in R of them.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.kivi_attention.api import PackedHalf, check_half
from pallas_kernels.kivi_push import reference
from pallas_kernels.kivi_push.configs import Config
from pallas_kernels.shapes import expect
from pallas_kernels.tuned import choose


class Pushed(NamedTuple):
    """The arrays of a cache after a push."""

    keys: PackedHalf
    values: PackedHalf
    tail_k: Array
    tail_v: Array


def kivi_push(
    keys: PackedHalf,
    values: PackedHalf,
    tail_k: Float[Array, "B K R H"],
    tail_v: Float[Array, "B K R H"],
    k: Float[Array, "B K 1 H"],
    v: Float[Array, "B K 1 H"],
    stored: Array,
    count: Array,
    *,
    key_bits: int,
    value_bits: int,
    flush: str,
    config: Config | None = None,
    implementation: Implementation | None = None,
) -> Pushed:
    """The cache with the token `k`, `v` behind the `stored[b]` (i32[B]) of each row whose `count`
    (i32[B], 0 or 1) is not 0; other rows stay as they are.

    With the flush "sliding" each value is quantized when it leaves the tail, to the place of its
    token, and the keys of a completed block are replaced in the tail by what their codes read as;
    with "block" values are quantized with their keys and the tail keeps both. What there is no room
    for is not written. New tokens come in the dtype of the tail, rounded by the caller. All buffers
    but those of `k` and `v` are taken over where the caller gives them up (donation).
    """
    batch, heads, residual, width = tail_k.shape
    lead = batch, heads
    expect("tail_v", tail_v, tail_k.shape)
    for name, x, tail in (("k", k, tail_k), ("v", v, tail_v)):
        expect(name, x, (*lead, 1, width))
        if x.dtype != tail.dtype:
            raise ValueError(f"{name} must be {tail.dtype}, as tail_{name} is, got {x.dtype}")
    expect("stored", stored, (batch,))
    expect("count", count, (batch,))
    if flush not in ("sliding", "block"):
        raise ValueError(f"flush must be 'sliding' or 'block', got {flush!r}")
    group = check_half("keys", keys, key_bits, lead, 0, width, token_words=True)
    value_group = check_half("values", values, value_bits, lead, 0, width, token_words=False)
    if residual % group:
        raise ValueError(f"the tail must have a multiple of {group} slots, got {residual}")
    rooms = {"keys": keys.words.shape[2] * (32 // key_bits)}
    if flush == "block":
        rooms["values"] = values.words.shape[2]
    for name, room in rooms.items():
        if room % residual:
            raise ValueError(f"{name} must have room for blocks of {residual}, got {room} tokens")
    form = {
        "key_bits": key_bits, "value_bits": value_bits, "key_group": group,
        "value_group": value_group,
    }  # fmt: skip
    config = config or choose(
        "kivi_push", Config, batch=batch, heads=heads, residual=residual, width=width, **form,
        sliding=int(flush == "sliding"),
    )  # fmt: skip
    spec = form | {"flush": flush}
    stored, count = stored.astype(jnp.int32), count.astype(jnp.int32)
    written = dispatch(
        implementation,
        functools.partial(reference.kivi_push, **spec),
        functools.partial(_kivi_push, config=config, **spec),
        *keys, *values, tail_k, tail_v, k, v, stored, count,
    )  # fmt: skip
    return Pushed(PackedHalf(*written[:3]), PackedHalf(*written[3:6]), *written[6:])


def _kivi_push(*args, **options):
    from pallas_kernels.kivi_push import triton  # a CPU never pays for Pallas

    return triton.kivi_push(*args, **options)
