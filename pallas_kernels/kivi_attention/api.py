"""Flash decoding over a quantized cache (KIVI, arXiv 2402.02750, section 3).

Keys are quantized per channel, in groups of consecutive tokens, and packed along tokens; values per
token, in groups of consecutive channels, and packed along channels. Codes are unpacked in
registers, and read once for the G query heads of a key/value head and all T queries. With head size
H, `bits` bits and groups of U numbers a key costs `H * (bits / 8 + 2 * scale bytes / U)` bytes, a
value the same.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dense_attention.api import checked
from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.kivi_attention import reference
from pallas_kernels.kivi_attention.configs import Config, heuristic
from pallas_kernels.shapes import expect
from pallas_kernels.softmax_state import ExtraKeys, Partial
from pallas_kernels.tuned import choose

BITS = (2, 4, 8)
GROUPS = (16, 32, 64, 128)


class PackedHalf(NamedTuple):
    """Packed keys or values: a group reads as `code * scale + zero`.

    Of keys: words u32[B, K, S * bits / 32, H], scale and zero [B, K, S / U, H]. Of values: words
    u32[B, K, S, H * bits / 32], scale and zero [B, K, S, H / U]. Word w holds the codes from
    `w * 32 / bits` on, the first in its lowest bits.
    """

    words: Array
    scale: Array
    zero: Array


def kivi_attention(
    q: Float[Array, "B K G T H"],
    keys: PackedHalf,
    values: PackedHalf,
    visible: Array,
    distance: Array | None = None,
    stop: Array | None = None,
    extra: ExtraKeys | None = None,
    *,
    key_bits: int,
    value_bits: int,
    scale: float,
    softcap: float | None = None,
    slopes: tuple[float, ...] | None = None,
    config: Config | None = None,
    implementation: Implementation | None = None,
) -> Partial | Float[Array, "B K G T H"]:
    """The softmax state of each query over the packed tokens that it sees, or with `extra` the
    attention output, as in `dense_attention`.

    `visible` bool[B|1, K|1, T|1, S] says how many of the packed tokens take part (S may be less
    than there is room for), `stop` i32[B] from where on nothing is read. With float32 queries all
    is float32; else queries, numbers and probabilities are multiplied in the dtype of the scales,
    where float16 is much the fastest, and summed in float32.
    """
    batch, heads, groups, size, width = q.shape
    slots = visible.shape[-1]
    check_half("keys", keys, key_bits, (batch, heads), slots, width, token_words=True)
    check_half("values", values, value_bits, (batch, heads), slots, width, token_words=False)
    distance, spec = checked(q, slots, visible, distance, stop, scale, softcap, slopes)
    config = config or choose(
        "kivi_attention", heuristic, batch, heads, groups * size, slots, width, q.dtype.itemsize,
        key_bits, value_bits=value_bits,
    )  # fmt: skip
    spec |= {"key_bits": key_bits, "value_bits": value_bits}
    return dispatch(
        implementation,
        functools.partial(reference.kivi_attention, **spec),
        functools.partial(_kivi_attention, config=config, **spec),
        q, *keys, *values, visible, distance, stop, extra,
    )  # fmt: skip


def supported(bits: int, group: int, width: int) -> bool:
    """Whether the kernel reads such codes; `width` is the head size."""
    return bits in BITS and group in GROUPS and width % group == 0 and width & (width - 1) == 0


def check_half(
    name: str, half: PackedHalf, bits: int, lead: tuple[int, int], tokens: int, width: int,
    *, token_words: bool,
) -> int:  # fmt: skip
    """The group size; raises if the shapes do not fit."""
    if bits not in BITS:
        raise ValueError(f"{name} have 2, 4 or 8 bits, got {bits}")
    if half.words.dtype != jnp.uint32:
        raise ValueError(f"{name}.words must be uint32, got {half.words.dtype}")
    count = 32 // bits
    if token_words:
        expect(f"{name}.words", half.words, (*lead, None, width))
        expect(f"{name}.scale", half.scale, (*lead, None, width))
        room, groups = half.words.shape[2] * count, half.scale.shape[2]
    else:
        expect(f"{name}.words", half.words, (*lead, None, width // count))
        expect(f"{name}.scale", half.scale, (*lead, half.words.shape[2], None))
        room, groups = width, half.scale.shape[3]
    expect(f"{name}.zero", half.zero, half.scale.shape)
    tokens_held = room if token_words else half.words.shape[2]
    if tokens > tokens_held:
        raise ValueError(f"`visible` has {tokens} tokens, {name} only {tokens_held}")
    group = room // groups if groups and room % groups == 0 else 0
    if group not in GROUPS or group % count:
        raise ValueError(
            f"{name} must have groups of 16, 32, 64 or 128 numbers that are whole words of {count} "
            f"codes, got {room} numbers in {groups} groups"
        )
    if width & (width - 1):
        raise ValueError(f"the head size must be a power of two, got {width}")
    return group


def _kivi_attention(*args, **options):
    from pallas_kernels.kivi_attention import triton  # a CPU never pays for Pallas

    return triton.kivi_attention(*args, **options)
