"""The merge of what the splits of an attention kernel wrote (flash decoding, arXiv 2311.01282,
section 3), in one launch.

A program owns one query row of one (row, key/value head). Splits are added up in the order of their
slots, whatever order they ran in: the same numbers give the same sums. The plain `jnp` form is
`attention_tile.merged`.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.common import blocks_of, launch, load, power_of_two, store

NUMBERS = 4096  # of accumulated values that a program holds at a time


def merge_splits(
    acc: Float[Array, "B K P R H"],
    peak: Float[Array, "B K P R"],
    norm: Float[Array, "B K P R"],
    *,
    interpret: bool,
) -> tuple[Float[Array, "B K R H"], Float[Array, "B K R"], Float[Array, "B K R"]]:
    """The softmax state of R query rows over the keys of all P splits; a lone split is that state,
    and nothing is launched."""
    batch, heads, splits, rows, width = acc.shape
    if splits == 1:
        return acc[:, :, 0], peak[:, :, 0], norm[:, :, 0]
    shape = (batch, heads, rows)
    return launch(
        _kernel, acc, peak, norm,
        out=tuple(jax.ShapeDtypeStruct(x, jnp.float32) for x in ((*shape, width), shape, shape)),
        grid=(batch * heads, rows), name="merge_splits", interpret=interpret,
    )  # fmt: skip


def _kernel(acc_ref, peak_ref, norm_ref, out_acc_ref, out_peak_ref, out_norm_ref):
    _, heads, splits, _, width = acc_ref.shape
    b, h, row = pl.program_id(0) // heads, pl.program_id(0) % heads, pl.program_id(1)
    every = jnp.arange(power_of_two(splits))
    columns = jnp.arange(power_of_two(width))
    size = max(min(NUMBERS // columns.size, every.size), 1)  # splits of a tile

    def peaks(part):
        return load(peak_ref.at[b, h, part, row], mask=part < splits, other=-jnp.inf)

    peak = peaks(every)
    top = jnp.max(peak)
    norm = load(norm_ref.at[b, h, every, row], mask=every < splits, other=0.0)

    def body(i, total):
        part = i * size + jnp.arange(size)
        values = load(
            acc_ref.at[b, h, part[:, None], row, columns[None]],
            mask=(part < splits)[:, None] & (columns < width)[None], other=0.0,
        )  # fmt: skip
        return total + jnp.sum(values * jnp.exp(peaks(part) - top)[:, None], axis=0)

    total = jax.lax.fori_loop(
        0, blocks_of(splits, size), body, jnp.zeros(columns.shape, jnp.float32)
    )
    store(out_acc_ref.at[b, h, row, columns], total, mask=columns < width)
    store(out_peak_ref.at[b, h, row], top)
    store(out_norm_ref.at[b, h, row], jnp.sum(norm * jnp.exp(peak - top)))
