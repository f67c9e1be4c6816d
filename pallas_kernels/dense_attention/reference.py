"""Dense attention in plain `jnp`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.softmax_state import NEGATIVE, attended


def scores(
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K S H"],
    distance: Int[Array, "#B #K T S"] | None,
    *,
    scale: float,
    softcap: float | None,
    slopes: tuple[float, ...] | None,
) -> Float[Array, "B K G T S"]:
    s = jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        s = softcap * jnp.tanh(s / softcap)
    if slopes is not None:
        assert distance is not None
        bias = jnp.asarray(slopes, jnp.float32).reshape(1, *q.shape[1:3], 1, 1)
        s = s - bias * distance[:, :, None].astype(jnp.float32)
    return s


def dense_attention(q, k, v, visible: Bool[Array, "#B #K #T S"], distance, stop, extra, **spec):
    mask = (visible & _before(stop, visible))[:, :, None]
    s = jnp.where(mask, scores(q, k, distance, **spec), NEGATIVE)
    peak = s.max(axis=-1)
    p = jnp.where(mask, jnp.exp(s - peak[..., None]), 0.0)
    clean = jnp.where(_before(stop, v[..., 0])[..., None], v, 0)  # what lies behind may be NaN
    acc = jnp.einsum("bkgts,bksh->bkgth", p.astype(v.dtype), clean, preferred_element_type=p.dtype)
    state = acc, peak, p.sum(axis=-1)
    return state if extra is None else attended(state, extra, q.dtype)


def key_weights(q, k, visible: Bool[Array, "#B #K #T S"], distance, lse, stop, **spec):
    mask = visible & _before(stop, visible)
    attn_weight = jnp.exp(scores(q, k, distance, **spec) - lse[..., None]).sum(axis=2)
    return jnp.where(mask, attn_weight, 0.0)


def _before(stop: Int[Array, " B"], like: jax.Array) -> Bool[Array, "B ..."]:
    """Whether the last axis of `like`, the keys, lies below `stop`."""
    keys = jnp.arange(like.shape[-1], dtype=jnp.int32)
    return keys < stop.reshape(-1, *(1,) * (like.ndim - 1))
