"""LESS's low-rank state in plain `jnp`, float32 or wider."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.softmax_state import NEGATIVE, Partial


def two_layers(
    x: Float[Array, "B N T H"],
    inner: Float[Array, "N H E"],
    outer: Float[Array, "N E R"],
    drop: Callable[[Array], Array] | None = None,
) -> Float[Array, "B N T R"]:
    """What both feature maps begin with; `drop` acts on what the first layer gives."""
    # Heads first: XLA CPU differentiates batched products with inner batch axes 3 times slower.
    batch, heads, size, width = x.shape
    dtype = jnp.result_type(x, jnp.float32)
    x, inner, outer = (a.astype(dtype) for a in (x, inner, outer))
    x = x.transpose(1, 0, 2, 3).reshape(heads, batch * size, width)
    x = jnp.einsum("nth,nhe->nte", x, inner)
    x = _gelu(x if drop is None else drop(x))
    x = _gelu(jnp.einsum("nte,ner->ntr", x, outer))
    return x.reshape(heads, batch, size, -1).transpose(1, 0, 2, 3)


def query_features(q, inner, outer, drop=None) -> Float[Array, "B N T R"]:
    """phi(q)."""
    return jnp.abs(two_layers(q, inner, outer, drop))


def key_features(k, inner, outer, mix, scale, mix_scale, drop=None) -> Float[Array, "B K A R"]:
    """psi(k)."""
    u = two_layers(k, inner, outer, drop) * jnp.abs(scale)[:, None]
    return jnp.abs(u + jnp.einsum("bkar,krs->bkas", u, mix) * mix_scale[:, None])


def low_rank_read(q, num, den, inner, outer) -> Partial:
    batch, heads, groups, size, width = q.shape
    phi = query_features(q.reshape(batch, heads * groups, size, width), inner, outer)
    return seen(phi.reshape(batch, heads, groups, size, -1), num, den)


def seen(
    phi: Float[Array, "B K G T R"], num: Float[Array, "B K R H"], den: Float[Array, "B K R"]
) -> Partial:
    """The state as queries with the features `phi` see it."""
    total = jnp.einsum("bkgtr,bkr->bkgt", phi, den)
    some = total > 0  # else the identity of the merge
    total = jnp.where(some, total, 1.0)
    acc = jnp.einsum("bkgtr,bkrh->bkgth", phi, num) / total[..., None]
    return Partial(
        jnp.where(some[..., None], acc, 0.0),
        jnp.where(some, jnp.log(total), NEGATIVE),
        some.astype(total.dtype),
    )


def low_rank_update(num, den, k, v, count, inner, outer, mix, scale, mix_scale):
    psi = key_features(k, inner, outer, mix, scale, mix_scale)
    gone = jnp.arange(k.shape[2], dtype=jnp.int32) < count[:, None, None]
    # A select, not a product: tokens from `count` on may be NaN.
    psi = jnp.where(gone[..., None], psi, 0.0)
    v = jnp.where(gone[..., None], v.astype(num.dtype), 0.0)
    return num + jnp.einsum("bkar,bkah->bkrh", psi, v), den + psi.sum(axis=2)


def _gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)
