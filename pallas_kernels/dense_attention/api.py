"""Flash decoding over a dense cache (arXiv 2311.01282, section 3).

One program reads a part of the keys and values of one key/value head once, for all query heads that
share it and all T queries (T > 1: a token tree or a short chunk). Axis letters are those of
jaxinfer: B rows, K key/value heads, G query heads of each, T queries, S slots, H head size.
"""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.common import expect
from pallas_kernels.dense_attention import reference, triton
from pallas_kernels.dense_attention.configs import Config, heuristic
from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.softmax_state import ExtraKeys
from pallas_kernels.tuned import choose

Partial = tuple[
    Float[Array, "B K G T H"], Float[Array, "B K G T"], Float[Array, "B K G T"]
]  # accumulated values, peak, norm


def dense_attention(
    q: Float[Array, "B K G T H"],
    k: Array,
    v: Array,
    visible: Array,
    distance: Array | None = None,
    stop: Array | None = None,
    extra: ExtraKeys | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    slopes: tuple[float, ...] | None = None,
    config: Config | None = None,
    implementation: Implementation | None = None,
) -> Partial | Float[Array, "B K G T H"]:
    """The softmax state of each query over the keys that it sees, in float32.

    `k`, `v` [B, K, S, H]; `visible` bool[B|1, K|1, T|1, S], `distance` i32 of such a shape, `stop`
    i32[B].

    `acc / norm` is the attention output and `peak + log(norm)` its log-sum-exp; a query that sees
    nothing has `norm` 0. `distance` (query minus key position) is needed by the ALiBi `slopes`, one
    per query head. Slots from `stop` on are not read. Given the `extra` of the keys, the result is
    the attention output over all, in the dtype of `q`; the launch that merges splits makes it.
    """
    expect("k", k, (*q.shape[:2], None, q.shape[4]))
    args, spec = checked(q, k.shape[2], visible, distance, stop, scale, softcap, slopes)
    expect("v", v, k.shape)
    visible, distance, stop = args
    config = config or _chosen("dense_attention", q, k)
    return dispatch(
        implementation,
        functools.partial(reference.dense_attention, **spec),
        functools.partial(triton.dense_attention, config=config, **spec),
        q, k, v, visible, distance, stop, extra,
    )  # fmt: skip


def key_weights(
    q: Float[Array, "B K G T H"],
    k: Array,
    visible: Array,
    lse: Float[Array, "B K G T"],
    distance: Array | None = None,
    stop: Array | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    slopes: tuple[float, ...] | None = None,
    config: Config | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B K T S"]:
    """The probability that each query gives each key, summed over its G heads (H2O, arXiv
    2306.14048): a second pass over the keys, once the log-sum-exp over everything is known."""
    expect("k", k, (*q.shape[:2], None, q.shape[4]))
    args, spec = checked(q, k.shape[2], visible, distance, stop, scale, softcap, slopes)
    expect("lse", lse, q.shape[:-1])
    visible, distance, stop = args
    config = config or _chosen("key_weights", q, k)
    return dispatch(
        implementation,
        functools.partial(reference.key_weights, **spec),
        functools.partial(triton.key_weights, config=config, **spec),
        q, k, visible, distance, lse, stop,
    )  # fmt: skip


def checked(
    q: Array, slots: int, visible: Array, distance: Array | None, stop: Array | None,
    scale: float, softcap: float | None, slopes: tuple[float, ...] | None,
):  # fmt: skip
    """The masks of an attention over `slots` tokens, completed, and the form of its scores."""
    batch, heads, groups, size, _ = q.shape
    masks = {"visible": visible} if distance is None else {"visible": visible, "distance": distance}
    for name, x in masks.items():
        fits = (
            x.ndim == 4
            and x.shape[3] == slots
            and all(a in (1, b) for a, b in zip(x.shape, (batch, heads, size), strict=False))
        )
        if not fits:
            raise ValueError(
                f"{name} must have shape [{batch}|1, {heads}|1, {size}|1, {slots}], "
                f"got {list(x.shape)}"
            )
    if slopes is not None and (distance is None or len(slopes) != heads * groups):
        raise ValueError(
            f"ALiBi needs `distance` and {heads * groups} slopes, one per query head; got "
            f"{'no distance' if distance is None else f'{len(slopes)} slopes'}"
        )
    if slopes is None:
        distance = None
    if stop is None:
        stop = jnp.full(batch, slots, jnp.int32)
    expect("stop", stop, (batch,))
    spec = {"scale": scale, "softcap": softcap, "slopes": slopes}
    return (visible, distance, stop), spec


def _chosen(kernel: str, q: Array, k: Array) -> Config:
    batch, heads, groups, size, width = q.shape
    sizes = (batch, heads, groups * size, k.shape[2], width, k.dtype.itemsize)
    return choose(kernel, heuristic, *sizes)
