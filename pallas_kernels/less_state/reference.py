"""LESS's low-rank state in plain `jnp`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

NEGATIVE = -1e30  # the peak of a partial softmax state without keys


def two_layers(
    x: Float[Array, "B N T H"], inner: Float[Array, "N H E"], outer: Float[Array, "N E R"]
) -> Float[Array, "B N T R"]:
    x, inner, outer = (a.astype(jnp.float32) for a in (x, inner, outer))
    hidden = jax.nn.gelu(jnp.einsum("bnth,nhe->bnte", x, inner), approximate=False)
    return jax.nn.gelu(jnp.einsum("bnte,ner->bntr", hidden, outer), approximate=False)


def key_features(k, inner, outer, mix, scale, mix_scale) -> Float[Array, "B K A R"]:
    """psi(k)."""
    u = two_layers(k, inner, outer) * jnp.abs(scale)[:, None]
    return jnp.abs(u + jnp.einsum("bkar,krs->bkas", u, mix) * mix_scale[:, None])


def low_rank_read(q, num, den, inner, outer):
    batch, heads, groups, size, width = q.shape
    phi = jnp.abs(two_layers(q.reshape(batch, heads * groups, size, width), inner, outer))
    phi = phi.reshape(batch, heads, groups, size, -1)
    total = jnp.einsum("bkgtr,bkr->bkgt", phi, den)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    acc = jnp.einsum("bkgtr,bkrh->bkgth", phi, num) / total[..., None]
    acc = jnp.where(some[..., None], acc, 0.0)
    return acc, jnp.where(some, jnp.log(total), NEGATIVE), some.astype(jnp.float32)


def low_rank_update(num, den, k, v, count, inner, outer, mix, scale, mix_scale):
    psi = key_features(k, inner, outer, mix, scale, mix_scale)
    gone = jnp.arange(k.shape[2], dtype=count.dtype) < count[:, None, None]
    # A select, not a product: tokens from `count` on may be NaN.
    psi = jnp.where(gone[..., None], psi, 0.0)
    v = jnp.where(gone[..., None], v.astype(jnp.float32), 0.0)
    return num + jnp.einsum("bkar,bkah->bkrh", psi, v), den + psi.sum(axis=2)
