"""The merge of what the splits of an attention kernel wrote (flash decoding, arXiv 2311.01282,
section 3), in one launch.

A program owns one query row of one (row, key/value head). Splits are added up in the order of their
slots, whatever order they ran in: the same numbers give the same sums. Given the extra keys,
the same launch adds them and divides, which leaves the attention's output. The plain `jnp` forms
are `softmax_state.merged` and `softmax_state.attended`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.common import launch, load, store
from pallas_kernels.shapes import blocks_of, power_of_two
from pallas_kernels.softmax_state import LEAST, NEGATIVE, ExtraKeys, Partial

NUMBERS = 4096  # of accumulated values that a program holds at a time


def joined(parts: tuple[Array, Array, Array], extra: ExtraKeys | None, q, *, interpret: bool):
    """What all splits wrote, as the softmax state of the queries `q` [B, K, G, T, H]; given the
    `extra` of the keys, the attention output over all, in the dtype of `q`."""
    groups, size = q.shape[2:4]
    if extra is not None:
        return attend_splits(*parts, extra, q.dtype, interpret=interpret).reshape(q.shape)
    state = merge_splits(*parts, interpret=interpret)
    return Partial(*(x.reshape(*x.shape[:2], groups, size, *x.shape[3:]) for x in state))


def merge_splits(
    acc: Float[Array, "B K P R H"],
    largest: Float[Array, "B K P R"],
    total: Float[Array, "B K P R"],
    *,
    interpret: bool,
) -> Partial:
    """The softmax state of R query rows over the keys of all P splits; a lone split is that state,
    and nothing is launched."""
    batch, heads, splits, rows, width = acc.shape
    if splits == 1:
        return Partial(acc[:, :, 0], largest[:, :, 0], total[:, :, 0])
    shape = (batch, heads, rows)
    state = launch(
        functools.partial(_kernel, has_extra=False), acc, largest, total,
        out=tuple(jax.ShapeDtypeStruct(x, jnp.float32) for x in ((*shape, width), shape, shape)),
        grid=(batch * heads, rows), name="merge_splits", interpret=interpret,
    )  # fmt: skip
    return Partial(*state)


def attend_splits(
    acc: Float[Array, "B K P R H"],
    largest: Float[Array, "B K P R"],
    total: Float[Array, "B K P R"],
    extra: ExtraKeys,
    dtype: jax.typing.DTypeLike,
    *,
    interpret: bool,
) -> Float[Array, "B K R H"]:
    """The attention output over the keys of all P splits and the rest."""
    batch, heads, _, rows, width = acc.shape
    state = () if extra.state is None else extra.state
    return launch(
        functools.partial(_kernel, has_extra=True), acc, largest, total,
        extra.scores.reshape(batch, heads, rows, -1), extra.values,
        *(x.reshape(batch, heads, rows, *x.shape[4:]) for x in state),
        out=jax.ShapeDtypeStruct((batch, heads, rows, width), dtype),
        grid=(batch * heads, rows), name="merge_splits", interpret=interpret,
    )  # fmt: skip


def _kernel(acc_ref, max_ref, sum_ref, *refs, has_extra: bool):
    _, heads, splits, _, width = acc_ref.shape
    b, h, row = pl.program_id(0) // heads, pl.program_id(0) % heads, pl.program_id(1)
    every, columns = jnp.arange(power_of_two(splits)), jnp.arange(power_of_two(width))
    inside = columns < width

    def maxima(part):
        return load(max_ref.at[b, h, part, row], mask=part < splits, other=-jnp.inf)

    def values(part, mask):
        return load(acc_ref.at[b, h, part, row, columns[None]], mask=mask, other=0.0)

    largest = maxima(every)
    total = load(sum_ref.at[b, h, every, row], mask=every < splits, other=0.0)
    if not has_extra:
        top = jnp.max(largest)
        acc = _weighted(splits, inside, lambda part: jnp.exp(maxima(part) - top), values)
        out_acc_ref, out_max_ref, out_sum_ref = refs
        store(out_acc_ref.at[b, h, row, columns], acc, mask=inside)
        store(out_max_ref.at[b, h, row], top)
        store(out_sum_ref.at[b, h, row], jnp.sum(total * jnp.exp(largest - top)))
        return

    score_ref, value_ref, *state, out_ref = refs
    fresh = score_ref.shape[3]
    keys = jnp.arange(power_of_two(fresh))

    def scores(key):
        return load(score_ref.at[b, h, row, key], mask=key < fresh, other=NEGATIVE)

    def fresh_values(key, mask):
        return load(value_ref.at[b, h, key, columns[None]], mask=mask, other=0.0).astype(
            total.dtype
        )

    def probability(score):
        return jnp.where(score > NEGATIVE, jnp.exp(score - top), 0.0)

    top = jnp.maximum(jnp.max(largest), jnp.max(scores(keys)))
    other_max = load(state[1].at[b, h, row]) if state else None  # of acc, max and sum
    if other_max is not None:
        top = jnp.maximum(top, other_max)
    acc = _weighted(splits, inside, lambda part: jnp.exp(maxima(part) - top), values)
    acc += _weighted(fresh, inside, lambda key: probability(scores(key)), fresh_values)
    total = jnp.sum(total * jnp.exp(largest - top)) + jnp.sum(probability(scores(keys)))
    if other_max is not None:
        weight = jnp.exp(other_max - top)
        acc += weight * load(state[0].at[b, h, row, columns], mask=inside, other=0.0)
        total += weight * load(state[2].at[b, h, row])
    out = acc / jnp.maximum(total, LEAST)
    store(out_ref.at[b, h, row, columns], out.astype(out_ref.dtype), mask=inside)


def _weighted(count: int, inside: Array, weight, values):
    """The sum of `count` rows, each times its weight; as many at a time as `NUMBERS` allows."""
    size = max(min(NUMBERS // inside.size, power_of_two(count)), 1)

    def body(i, total):
        part = i * size + jnp.arange(size)
        mask = (part < count)[:, None] & inside[None]
        return total + jnp.sum(values(part[:, None], mask) * weight(part)[:, None], axis=0)

    start = jnp.zeros(inside.shape, jnp.float32)
    return jax.lax.fori_loop(0, blocks_of(count, size), body, start)
