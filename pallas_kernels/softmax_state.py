"""Softmax states of attention kernels in plain `jnp`; imports no kernel language.

A state is what some keys contribute to a softmax: accumulated values, peak, norm, in float32.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

NEGATIVE = -1e30  # finite, so that the difference of two empty peaks is 0
LEAST = 1e-30  # a norm that is divided by: queries that saw no key get 0


class ExtraKeys(NamedTuple):
    """The keys that a call attends to beside those of a cache: few fresh ones, and perhaps others
    by their softmax state."""

    scores: Any  # f32[B, K, G, T, J], NEGATIVE where a query does not see a key
    values: Any  # [B, K, J, H]
    state: Any = None  # (acc, peak, norm) of [B, K, G, T]


def merged(acc, peak, norm):
    """The partial softmax states of all splits (axis 2) as one."""
    top = peak.max(axis=2)
    scale = jnp.exp(peak - top[:, :, None])
    return (acc * scale[..., None]).sum(axis=2), top, (norm * scale).sum(axis=2)


def attended(state, extra: ExtraKeys, dtype):
    """The attention output over the keys of a softmax state and the rest of them."""
    peak = extra.scores.max(axis=-1)
    p = jnp.where(extra.scores > NEGATIVE, jnp.exp(extra.scores - peak[..., None]), 0.0)
    acc = jnp.einsum("bkgtj,bkjh->bkgth", p, extra.values.astype(p.dtype))
    states = [state, (acc, peak, p.sum(axis=-1)), *([] if extra.state is None else [extra.state])]
    acc, _, norm = merged(*(jnp.stack(parts, axis=2) for parts in zip(*states, strict=True)))
    return (acc / jnp.maximum(norm, LEAST)[..., None]).astype(dtype)
