"""Attention over selected heads in plain `jnp`."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.softmax_state import NEGATIVE, Partial


def sparse_heads(
    q: Float[Array, "B K G H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    length: Int[Array, " B"],
    groups: Int[Array, "B cap"],
    count: Int[Array, " B"],
    *,
    scale: float,
):
    seen = jnp.arange(k.shape[2]) < length[:, None, None]  # [B, 1, S]
    seen = seen & selected(groups, count, k.shape[1])[..., None]
    mask = seen[:, :, None]
    s = jnp.einsum("bkgh,bksh->bkgs", q, k, preferred_element_type=jnp.float32) * scale
    s = jnp.where(mask, s, NEGATIVE)
    top = s.max(axis=-1)
    p = jnp.where(mask, jnp.exp(s - top[..., None]), 0.0)
    clean = jnp.where(seen[..., None], v, 0)  # what is not seen may be NaN
    acc = jnp.einsum("bkgs,bksh->bkgh", p.astype(v.dtype), clean, preferred_element_type=p.dtype)
    return Partial(acc, top, p.sum(axis=-1))


def selected(
    groups: Int[Array, "B cap"], count: Int[Array, " B"], heads: int
) -> Bool[Array, "B K"]:
    """Whether each of `heads` stands in the live part of its row's list."""
    live = jnp.arange(groups.shape[1]) < count[:, None]
    return ((groups[:, None] == jnp.arange(heads)[:, None]) & live[:, None]).any(axis=-1)
