"""What a cache writes with Pallas kernels on a CUDA device, and with XLA anywhere else.

`backend` is that of `jaxinfer.ops.stored`. All kernels write in place: the caller makes `index` or
`count` depend on the reads of what they overwrite (`pallas_kernels.ordering.write_index`). Axis
letters: M runs, N tokens of all runs, A absorbed or written tokens, R rank.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfer.runtime.backend import Backend
from jaxinfer.typing import Params
from pallas_kernels import put_tokens as slots
from pallas_kernels.kivi_attention import PackedHalf
from pallas_kernels.kivi_push import Pushed, kivi_push
from pallas_kernels.less_state import low_rank_update
from pallas_kernels.quantize_pack import quantize_pack

ABSORBED_AT_ONCE = 64  # tokens; one program adds all of a head's, which leaves most of a GPU idle
Arrays = Mapping[str, Array]


def write_tokens(
    stored: Arrays, tokens: Arrays, index: Array, after: tuple[Array, ...], *, backend: Backend
) -> dict[str, Array]:
    """`stored` with `tokens` at the slots `index` i32[B, A] or [B, K, A]; the array "k" has the
    layout of the backend. XLA writes after `after`, of what the stored arrays are made."""
    return slots.put_tokens(
        stored, tokens, index, after=after, layout=backend.layout,
        implementation=backend.implementation,
    )  # fmt: skip


def swap_tokens(
    stored: Arrays, tokens: Arrays, index: Array, after: tuple[Array, ...], *, backend: Backend
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The same, with the tokens that are not kept: what lay in the slots, or where an index is out
    of range the new one."""
    return slots.swap_tokens(
        stored, tokens, index, after=after, layout=backend.layout,
        implementation=backend.implementation,
    )  # fmt: skip


def write_packed(
    half: PackedHalf, x: Float[Array, "B K N H"], index: Int[Array, "B M"], *, bits: int,
    per_channel: bool, backend: Backend,
) -> PackedHalf:  # fmt: skip
    """`half` with the M runs of tokens of `x` quantized and written at the runs `index`."""
    return quantize_pack(
        half, x, index if per_channel else _in_powers_of_two(index, x.shape[2]), bits=bits,
        per_channel=per_channel, implementation=backend.implementation,
    )  # fmt: skip


def push_token(
    keys: PackedHalf, values: PackedHalf, tail_k: Array, tail_v: Array, k: Array, v: Array,
    stored: Int[Array, " B"], count: Int[Array, " B"], *, key_bits: int, value_bits: int,
    flush: str, backend: Backend,
) -> Pushed:  # fmt: skip
    """A quantized cache with one token, in the dtype of the tail, behind the `stored` ones of each
    row that takes it (`count` 0 or 1)."""
    return kivi_push(
        keys, values, tail_k, tail_v, k, v, stored, count, key_bits=key_bits,
        value_bits=value_bits, flush=flush, implementation=backend.implementation,
    )  # fmt: skip


def absorb(
    num: Float[Array, "B K R H"], den: Float[Array, "B K R"], k: Float[Array, "B K A H"],
    v: Float[Array, "B K A H"], count: Int[Array, " B"], feature_maps: Params, *, backend: Backend,
) -> tuple[Float[Array, "B K R H"], Float[Array, "B K R"]]:  # fmt: skip
    """LESS's state with the first `count[b]` tokens of each row added; without a named
    implementation XLA adds what a long prompt evicts, also on a GPU."""
    names = ("key_inner", "key_outer", "mix", "scale", "mix_scale")
    implementation = backend.implementation
    if implementation is None and k.shape[2] > ABSORBED_AT_ONCE:
        implementation = "reference"
    maps = (feature_maps[name] for name in names)
    return low_rank_update(num, den, k, v, count, *maps, implementation=implementation)


def _in_powers_of_two(index: Int[Array, "B M"], tokens: int) -> Int[Array, "B _"]:
    """The same places in runs of a power of two of tokens, which values are written in."""
    run = tokens // index.shape[1]
    parts = run // (run & -run)
    return (index[:, :, None] * parts + jnp.arange(parts, dtype=index.dtype)).reshape(
        index.shape[0], -1
    )
