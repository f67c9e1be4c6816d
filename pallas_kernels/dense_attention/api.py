"""Flash decoding over a dense cache (arXiv 2311.01282, section 3).

One program reads a part of the keys and values of one key/value head once, for all query heads that
share it and all T queries (T > 1: a token tree or a short chunk). Axis letters are those of
jaxinfer: B rows, K key/value heads, G query heads of each, T queries, S slots, H head size.
"""

import functools

from jaxtyping import Array, Float

from pallas_kernels.dense_attention import reference
from pallas_kernels.dense_attention.configs import Config, heuristic
from pallas_kernels.dispatch import Implementation, KeyLayout, check_layout, dispatch
from pallas_kernels.shapes import expect
from pallas_kernels.softmax_state import ExtraKeys, Partial
from pallas_kernels.tuned import choose


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
    layout: KeyLayout = "BKSH",
    config: Config | None = None,
    implementation: Implementation | None = None,
) -> Partial | Float[Array, "B K G T H"]:
    """The softmax state of each query over the keys that it sees, in float32.

    `k`, `v` [B, K, S, H]; `visible` bool[B|1, K|1, T|1, S], `distance` i32 of such a shape, `stop`
    i32[B]. With the layout "BKHS" keys are [B, K, H, S], which the reference alone reads.

    A query that sees nothing has `sum` 0. `distance` (query minus key position) is needed by the
    ALiBi `slopes`, one per query head. Slots from `stop` on are not read.
    Given the `extra` keys, the result is the attention output over all, in the dtype of `q`; the
    launch that merges splits makes it.
    """
    slots = _slots("k", k, q, layout, implementation)
    distance, spec = checked(q, slots, visible, distance, stop, scale, softcap, slopes)
    expect("v", v, (*q.shape[:2], slots, q.shape[4]))
    config = config or _chosen("dense_attention", q, slots, k.dtype.itemsize)
    return dispatch(
        implementation,
        functools.partial(reference.dense_attention, layout=layout, **spec),
        functools.partial(_dense_attention, config=config, **spec),
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
    layout: KeyLayout = "BKSH",
    config: Config | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B K T S"]:
    """The probability that each query gives each key, summed over its G heads (H2O, arXiv
    2306.14048): a second pass over the keys, once the log-sum-exp over everything is known."""
    slots = _slots("k", k, q, layout, implementation)
    distance, spec = checked(q, slots, visible, distance, stop, scale, softcap, slopes)
    expect("lse", lse, q.shape[:-1])
    config = config or _chosen("key_weights", q, slots, k.dtype.itemsize)
    return dispatch(
        implementation,
        functools.partial(reference.key_weights, layout=layout, **spec),
        functools.partial(_key_weights, config=config, **spec),
        q, k, visible, lse, distance, stop,
    )  # fmt: skip


def checked(
    q: Array, slots: int, visible: Array, distance: Array | None, stop: Array | None,
    scale: float, softcap: float | None, slopes: tuple[float, ...] | None,
):  # fmt: skip
    """The distance, if it is needed, and the form of the scores of an attention over `slots`
    tokens; raises if a mask does not fit."""
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
    if stop is not None:
        expect("stop", stop, (batch,))
    return distance, {"scale": scale, "softcap": softcap, "slopes": slopes}


def _slots(
    name: str, k: Array, q: Array, layout: KeyLayout, implementation: Implementation | None
) -> int:
    """The tokens that `k` has room for; raises if its shape does not fit."""
    check_layout(layout, implementation)
    batch, heads, _, _, width = q.shape
    expect(
        name, k, (batch, heads, width, None) if layout == "BKHS" else (batch, heads, None, width)
    )
    return k.shape[3 if layout == "BKHS" else 2]


def _chosen(kernel: str, q: Array, slots: int, itemsize: int) -> Config:
    batch, heads, groups, size, width = q.shape
    sizes = (batch, heads, groups * size, slots, width, itemsize)
    return choose(kernel, heuristic, *sizes)


def _dense_attention(*args, **options):
    from pallas_kernels.dense_attention import triton  # a CPU never pays for Pallas

    return triton.dense_attention(*args, **options)


def _key_weights(*args, **options):
    from pallas_kernels.dense_attention import triton  # a CPU never pays for Pallas

    return triton.key_weights(*args, **options)
