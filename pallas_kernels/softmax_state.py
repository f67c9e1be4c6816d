"""Softmax states of attention kernels in plain `jnp`; imports no kernel language.

A state is what some keys contribute to a softmax, in float32.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

NEGATIVE = -1e30  # finite, so that the difference of two empty maxima is 0
LEAST = 1e-30  # a sum that is divided by: queries that saw no key get 0


class Partial(NamedTuple):
    """A softmax over some keys: `acc / sum` is its output, `max + log(sum)` its log-sum-exp."""

    acc: Any  # [..., H], accumulated values
    max: Any  # [...], the largest score
    sum: Any  # [...], of the exponentials of scores less the largest


class ExtraKeys(NamedTuple):
    """The keys that a call attends to beside those of a cache: few fresh ones, and perhaps others
    by their softmax state."""

    scores: Any  # f32[B, K, G, T, J], NEGATIVE where a query does not see a key
    values: Any  # [B, K, J, H]
    state: Any = None  # a `Partial` of [B, K, G, T]


def merged(acc, largest, total) -> Partial:
    """The partial softmax states of all splits (axis 2) as one."""
    top = largest.max(axis=2)
    scale = jnp.exp(largest - top[:, :, None])
    return Partial((acc * scale[..., None]).sum(axis=2), top, (total * scale).sum(axis=2))


def attended(state, extra: ExtraKeys, dtype):
    """The attention output over the keys of a softmax state and the rest of them."""
    top = extra.scores.max(axis=-1)
    p = jnp.where(extra.scores > NEGATIVE, jnp.exp(extra.scores - top[..., None]), 0.0)
    acc = jnp.einsum("bkgtj,bkjh->bkgth", p, extra.values.astype(p.dtype))
    states = [state, (acc, top, p.sum(axis=-1)), *([] if extra.state is None else [extra.state])]
    acc, _, total = merged(*(jnp.stack(parts, axis=2) for parts in zip(*states, strict=True)))
    return (acc / jnp.maximum(total, LEAST)[..., None]).astype(dtype)
