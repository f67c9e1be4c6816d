"""Dense attention in plain `jnp`.

Products read keys and values in the dtype that they are stored in and accumulate in float32; where
inputs are float64 (a check of the algebra) so is everything. Extra letter: J keys.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dispatch import KeyLayout
from pallas_kernels.softmax_state import NEGATIVE, Partial, attended


def scores(
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K _ _"],
    distance: Int[Array, "#B _ #T J"] | None,
    *,
    scale: float,
    softcap: float | None,
    slopes: tuple[float, ...] | None,
    layout: KeyLayout = "BKSH",
) -> Float[Array, "B K G T J"]:
    """Scaled dot products, soft-capped and ALiBi-biased; `distance` is query minus key position.

    ALiBi is `-slope * distance` (arXiv 2108.12409), which equals the usual bias by key position up
    to a constant that the softmax removes.
    """
    dims = "bkgth,bkhj->bkgtj" if layout == "BKHS" else "bkgth,bkjh->bkgtj"
    dtype = jnp.result_type(q, k, jnp.float32)
    s = jnp.einsum(dims, q, k, preferred_element_type=dtype) * scale
    if softcap is not None:
        s = softcap * jnp.tanh(s / softcap)
    if slopes is not None:
        assert distance is not None
        bias = jnp.asarray(slopes, dtype).reshape(1, q.shape[1], q.shape[2], 1, 1)
        s = s - bias * distance[:, :, None].astype(dtype)
    return s


def dense_attention(
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K _ _"],
    v: Float[Array, "B K J H"],
    visible: Bool[Array, "#B _ #T J"],
    distance: Int[Array, "#B _ #T J"] | None = None,
    stop: Int[Array, " B"] | None = None,
    extra=None,
    **spec,
):
    """The softmax state of `q` over `k, v`, restricted to `visible` and to keys before `stop`."""
    clean = v
    if stop is not None:
        visible = visible & _before(stop, visible)
        clean = jnp.where(_before(stop, v[..., 0])[..., None], v, 0)  # what lies behind may be NaN
    mask = visible[:, :, None]
    s = scores(q, k, distance, **spec)
    s = jnp.where(mask, s, NEGATIVE)  # before the exponential: no overflow, so no NaN in gradients
    top = jnp.max(s, axis=-1)
    p = jnp.where(mask, jnp.exp(s - top[..., None]), 0.0)
    acc = jnp.einsum("bkgtj,bkjh->bkgth", p.astype(v.dtype), clean, preferred_element_type=s.dtype)
    state = Partial(acc, top, p.sum(axis=-1))
    return state if extra is None else attended(state, extra, q.dtype)


def key_weights(
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K _ _"],
    visible: Bool[Array, "#B _ #T J"],
    lse: Float[Array, "B K G T"],
    distance: Int[Array, "#B _ #T J"] | None = None,
    stop: Int[Array, " B"] | None = None,
    **spec,
) -> Float[Array, "B K T J"]:
    """The probability that each query gives each key, summed over the group's query heads.

    A second pass over the keys once the log-sum-exp over all segments is known; the sum over all
    keys of all segments is G for every query.
    """
    if stop is not None:
        visible = visible & _before(stop, visible)
    s = scores(q, k, distance, **spec)
    return jnp.where(visible, jnp.exp(s - lse[..., None]).sum(axis=2), 0.0)


def _before(stop: Int[Array, " B"], like: jax.Array) -> Bool[Array, "B ..."]:
    """Whether the last axis of `like`, the keys, lies below `stop`."""
    keys = jnp.arange(like.shape[-1], dtype=jnp.int32)
    return keys < stop.reshape(-1, *(1,) * (like.ndim - 1))
