"""Attention as a merge of partial softmax states.

A `Partial` is what one segment of keys contributes to a softmax: the weighted value sum, the
running maximum and the running normaliser, all float32. `merge` is associative, so stored tokens,
packed tokens and the fresh tokens of a call are attended to apart and merged (flash decoding, arXiv
2311.01282, section 3). Extra letter: J keys of one segment, G query heads per key/value head.
Queries come grouped, [B, K, G, T, H]. The products are those of
`pallas_kernels.dense_attention.reference`, the oracle of the GPU kernels.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dense_attention import reference
from pallas_kernels.dispatch import KeyLayout
from pallas_kernels.softmax_state import LEAST, NEGATIVE, Partial


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """What one layer's scores look like: scale, soft cap, sliding window and ALiBi slopes per
    head."""

    scale: float
    softcap: float | None = None
    window: int | None = None
    slopes: tuple[float, ...] | Array | None = None

    @property
    def of_scores(self) -> dict[str, Any]:
        """What the functions of `pallas_kernels` take."""
        return {"scale": self.scale, "softcap": self.softcap, "slopes": self.slopes}


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
    """Scaled dot products, soft-capped and ALiBi-biased; `distance` is query minus key position."""
    return reference.scores(q, k, distance, layout=layout, **spec.of_scores)


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
    return reference.dense_attention(q, k, v, visible, distance, layout=layout, **spec.of_scores)


def key_weights(
    spec: AttentionSpec,
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K _ _"],
    distance: Int[Array, "#B _ T J"],
    visible: Bool[Array, "#B _ #T J"],
    lse: Float[Array, "B K G T"],
    layout: KeyLayout = "BKSH",
) -> Float[Array, "B K T J"]:
    """The probability that each query gives each key, summed over the group's query heads; a
    second pass, once the log-sum-exp over all segments is known."""
    return reference.key_weights(q, k, visible, lse, distance, layout=layout, **spec.of_scores)
