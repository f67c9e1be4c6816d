"""What a cache writes with Pallas kernels on a CUDA device, and with XLA anywhere else.

`backend` is that of `jaxinfer.ops.stored`. All kernels write in place: the caller makes
`index` or `count` depend on the reads of what they overwrite (`jaxinfer.cache.base.write_index`).
Axis letters: M runs, N tokens of all runs, A absorbed or written tokens, R rank.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfer.runtime.backend import Backend
from jaxinfer.typing import Params
from pallas_kernels.dispatch import dispatch, implementation_of

ABSORBED_AT_ONCE = 64  # tokens; one program adds all of a head's, which leaves most of a GPU idle


def write_tokens(
    slots: Any, items: Any, index: Array, *, reference: Callable[..., Any],
    backend: Backend,
) -> Any:  # fmt: skip
    """`Slots` of `jaxinfer.cache.slots` with `items` written at `index` i32[B, A] or [B, K, A], in
    every array that the slots have; `reference` of the three does the same."""

    def kernel(slots, items, index, *, interpret):
        from pallas_kernels.put_tokens import put_tokens

        arrays = _arrays(slots, items)
        return replace(
            slots, **put_tokens(*arrays, index, implementation=implementation_of(interpret))
        )

    return dispatch(backend.implementation, reference, kernel, slots, items, index)


def swap_tokens(
    slots: Any, items: Any, index: Array, *, reference: Callable[..., Any],
    backend: Backend,
) -> tuple[Any, Any]:  # fmt: skip
    """The same, with the items that are not kept: what lay in the slots, or where an index is out
    of range the new one."""

    def kernel(slots, items, index, *, interpret):
        from pallas_kernels.put_tokens import swap_tokens

        arrays = _arrays(slots, items)
        new, left = swap_tokens(*arrays, index, implementation=implementation_of(interpret))
        return replace(slots, **new), replace(items, **left)

    return dispatch(backend.implementation, reference, kernel, slots, items, index)


def _arrays(slots: Any, items: Any) -> tuple[dict[str, Array], dict[str, Array]]:
    names = [x for x in ("k", "v", "attn_weight", "pos") if getattr(slots, x) is not None]
    stored, tokens = ({name: getattr(of, name) for name in names} for of in (slots, items))
    return stored, tokens


def write_packed(
    half: Any, x: Float[Array, "B K N H"], index: Int[Array, "B M"], *, bits: int,
    per_channel: bool, reference: Callable[..., Any], backend: Backend,
) -> Any:  # fmt: skip
    """`half`, a `PackedHalf` of `pallas_kernels.kivi_attention`, with the M runs of tokens of `x`
    quantized and written at the runs `index`; `reference` of the three does the same."""

    def kernel(half, x, index, *, interpret):
        from pallas_kernels.quantize_pack import quantize_pack

        return quantize_pack(
            half, x, index if per_channel else _in_powers_of_two(index, x.shape[2]), bits=bits,
            per_channel=per_channel, implementation=implementation_of(interpret),
        )  # fmt: skip

    return dispatch(backend.implementation, reference, kernel, half, x, index)


def push_token(
    state: Any, fresh: Any, stored: Int[Array, " B"], count: Int[Array, " B"], *, flush: str,
    reference: Callable[..., Any], backend: Backend,
) -> Any:  # fmt: skip
    """`KiviState` of `jaxinfer.cache.kivi` with the one token in the slots `fresh` behind the
    `stored` ones of each row that takes it (`count` 0 or 1); `reference` of the four does the same.
    """

    def kernel(state, fresh, stored, count, *, interpret):
        from pallas_kernels.kivi_push import kivi_push

        keys, values, tail = state.keys, state.values, state.tail
        new = kivi_push(
            keys.half, values.half, tail.k, tail.v, fresh.k, fresh.v, stored, count,
            key_bits=keys.format.bits, value_bits=values.format.bits, flush=flush,
            implementation=implementation_of(interpret),
        )  # fmt: skip
        return replace(
            state, keys=keys.of(new.keys), values=values.of(new.values),
            tail=replace(tail, k=new.tail_k, v=new.tail_v),
        )  # fmt: skip

    return dispatch(backend.implementation, reference, kernel, state, fresh, stored, count)


def absorb(
    num: Float[Array, "B K R H"], den: Float[Array, "B K R"], k: Float[Array, "B K A H"],
    v: Float[Array, "B K A H"], count: Int[Array, " B"], kernels: Params, *,
    reference: Callable[..., Any], backend: Backend,
) -> tuple[Float[Array, "B K R H"], Float[Array, "B K R"]]:  # fmt: skip
    """LESS's state with the first `count[b]` tokens of each row added; `reference` of the six does
    the same, and without a name also on a GPU for what a long prompt evicts."""

    def kernel(num, den, k, v, count, kernels, *, interpret):
        from pallas_kernels.less_state import low_rank_update

        names = ("key_inner", "key_outer", "mix", "scale", "mix_scale")
        return low_rank_update(
            num, den, k, v, count, *(kernels[name] for name in names),
            implementation=implementation_of(interpret),
        )  # fmt: skip

    implementation = backend.implementation
    if implementation is None and k.shape[2] > ABSORBED_AT_ONCE:
        implementation = "reference"
    return dispatch(implementation, reference, kernel, num, den, k, v, count, kernels)


def _in_powers_of_two(index: Int[Array, "B M"], tokens: int) -> Int[Array, "B _"]:
    """The same places in runs of a power of two of tokens, which values are written in."""
    run = tokens // index.shape[1]
    parts = run // (run & -run)
    return (index[:, :, None] * parts + jnp.arange(parts, dtype=index.dtype)).reshape(
        index.shape[0], -1
    )
