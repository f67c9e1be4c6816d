"""What a cache writes with Pallas kernels on a CUDA device, and with XLA anywhere else.

`implementation` is that of `jaxinfer.ops.stored`. Both kernels write in place: the caller makes
`index` or `count` depend on the reads of what they overwrite (`jaxinfer.cache.base.write_index`).
Axis letters: M runs, N tokens of all runs, A absorbed tokens, R rank.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfer.ops.stored import implementation_of
from jaxinfer.typing import Params
from pallas_kernels.dispatch import Implementation, dispatch

ABSORBED_AT_ONCE = 64  # tokens; one program adds all of a head's, which leaves most of a GPU idle


def write_packed(
    half: Any, x: Float[Array, "B K N H"], index: Int[Array, "B M"], *, bits: int,
    per_channel: bool, reference: Callable[..., Any], implementation: Implementation | None,
) -> Any:  # fmt: skip
    """`half`, a `PackedHalf` of `pallas_kernels.kivi_attention`, with the M runs of tokens of `x`
    quantized and written at the runs `index`; `reference` of the three does the same."""

    def kernel(half, x, index, *, interpret):
        from pallas_kernels.quantize_pack import quantize_pack

        return quantize_pack(
            half, x, index if per_channel else _in_powers_of_two(index, x.shape[2]), bits=bits,
            per_channel=per_channel, implementation=implementation_of(interpret),
        )  # fmt: skip

    return dispatch(implementation, reference, kernel, half, x, index)


def absorb(
    num: Float[Array, "B K R H"], den: Float[Array, "B K R"], k: Float[Array, "B K A H"],
    v: Float[Array, "B K A H"], count: Int[Array, " B"], kernels: Params, *,
    reference: Callable[..., Any], implementation: Implementation | None,
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
