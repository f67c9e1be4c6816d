"""Attention as a merge of partial softmax states.

A `Partial` is what one segment of keys contributes to a softmax: the weighted value sum, the
running maximum and the running normaliser, all float32. `merge` is associative, so stored tokens,
packed tokens and the fresh tokens of a call are attended to apart and merged (flash decoding, arXiv
2311.01282, section 3). Extra letter: J keys of one segment, G query heads per key/value head.
Queries come grouped, [B, K, G, T, H]. The matrix products read keys and values in their storage
dtype and accumulate in float32; where inputs are float64 (a check of the algebra) so is everything.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxinfer.runtime.backend import KeyLayout
from pallas_kernels.softmax_state import LEAST, NEGATIVE


class Partial(NamedTuple):
    """A softmax over some keys: `acc / sum` is its output, `max + log(sum)` its log-sum-exp."""

    acc: Float[Array, "B K G T H"]
    max: Float[Array, "B K G T"]
    sum: Float[Array, "B K G T"]


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """What one layer's scores look like: scale, soft cap, sliding window and ALiBi slopes per
    head."""

    scale: float
    softcap: float | None = None
    window: int | None = None
    slopes: tuple[float, ...] | None = None


def empty_partial(q: Float[Array, "B K G T H"]) -> Partial:
    """The identity of `merge`."""
    dtype = jnp.result_type(q, jnp.float32)
    return Partial(
        jnp.zeros(q.shape, dtype),
        jnp.full(q.shape[:-1], NEGATIVE, dtype),
        jnp.zeros(q.shape[:-1], dtype),
    )


def sink_partial(q: Float[Array, "B K G T H"], sink: Float[Array, " N"]) -> Partial:
    """A softmax that has seen one key of logit `sink` per head and value 0 (arXiv 2309.17453,
    section 3.3: a logit of 0 is SoftMax-off-by-one)."""
    empty = empty_partial(q)
    top = sink.astype(empty.max.dtype).reshape(1, q.shape[1], q.shape[2], 1)
    top = jnp.broadcast_to(jnp.maximum(top, NEGATIVE), empty.max.shape)
    return Partial(empty.acc, top, (top > NEGATIVE).astype(top.dtype))


def merge(a: Partial, b: Partial) -> Partial:
    """The softmax state over the keys of both."""
    top = jnp.maximum(a.max, b.max)
    scale_a, scale_b = jnp.exp(a.max - top), jnp.exp(b.max - top)
    acc = a.acc * scale_a[..., None] + b.acc * scale_b[..., None]
    return Partial(acc, top, a.sum * scale_a + b.sum * scale_b)


def finish(partial: Partial) -> Float[Array, "B K G T H"]:
    """The attention output; finite (0) for queries that saw no key."""
    return partial.acc / jnp.maximum(partial.sum, LEAST)[..., None]


def log_sum_exp(partial: Partial) -> Float[Array, "B K G T"]:
    return partial.max + jnp.log(jnp.maximum(partial.sum, LEAST))


def scores(
    spec: AttentionSpec,
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K _ _"],
    distance: Int[Array, "#B _ T J"],
    layout: KeyLayout,
) -> Float[Array, "B K G T J"]:
    """Scaled dot products, soft-capped and ALiBi-biased; `distance` is query minus key position.

    ALiBi is `-slope * distance` (arXiv 2108.12409), which equals the usual bias by key position up
    to a constant that the softmax removes.
    """
    dims = "bkgth,bkhj->bkgtj" if layout == "BKHS" else "bkgth,bkjh->bkgtj"
    dtype = jnp.result_type(q, k, jnp.float32)
    s = jnp.einsum(dims, q, k, preferred_element_type=dtype) * spec.scale
    if spec.softcap is not None:
        s = spec.softcap * jnp.tanh(s / spec.softcap)
    if spec.slopes is not None:
        slopes = jnp.asarray(spec.slopes, dtype).reshape(1, q.shape[1], q.shape[2], 1, 1)
        s = s - slopes * distance[:, :, None].astype(dtype)
    return s


def partial_attention(
    spec: AttentionSpec,
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K _ _"],
    v: Float[Array, "B K J H"],
    distance: Int[Array, "#B _ T J"],
    visible: Bool[Array, "#B _ #T J"],
    layout: KeyLayout = "BKSH",
) -> Partial:
    """The softmax state of `q` over `k, v`, restricted to `visible`."""
    s = scores(spec, q, k, distance, layout)
    mask = visible[:, :, None]
    s = jnp.where(mask, s, NEGATIVE)  # before the exponential: no overflow, so no NaN in gradients
    top = jnp.max(s, axis=-1)
    p = jnp.where(mask, jnp.exp(s - top[..., None]), 0.0)
    acc = jnp.einsum("bkgtj,bkjh->bkgth", p.astype(v.dtype), v, preferred_element_type=s.dtype)
    return Partial(acc, top, p.sum(axis=-1))


def key_weights(
    spec: AttentionSpec,
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K _ _"],
    distance: Int[Array, "#B _ T J"],
    visible: Bool[Array, "#B _ #T J"],
    lse: Float[Array, "B K G T"],
    layout: KeyLayout = "BKSH",
) -> Float[Array, "B K T J"]:
    """The probability that each query gives each key, summed over the group's query heads.

    A second pass over the keys once the log-sum-exp over all segments is known; the sum over all
    keys of all segments is G for every query.
    """
    s = scores(spec, q, k, distance, layout)
    return jnp.where(visible, jnp.exp(s - lse[..., None]).sum(axis=2), 0.0)
