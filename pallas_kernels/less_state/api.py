"""LESS (arXiv 2402.09398, section 3): evicted tokens live on in a state of constant size.

The feature maps of the paper's equations 1-2 are part of both kernels, so that reading is one
launch and absorbing is one, and no feature reaches memory:

    phi(q) = |gelu(gelu(q Wq1) Wq2)|                                 queries, N heads
    u = |s| gelu(gelu(k Wk1) Wk2),  psi(k) = |u + (u W3) s'|         keys, K heads

Axis letters: B rows, K key/value heads, G query heads of each, N = K G, T queries, A evicted
tokens, H head size, E width of the hidden layer, R rank.

Products, sums and the state are float32.
"""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.less_state import reference
from pallas_kernels.less_state.configs import Config, heuristic
from pallas_kernels.shapes import expect
from pallas_kernels.softmax_state import Partial
from pallas_kernels.tuned import choose


def low_rank_read(
    q: Array,
    num: Array,
    den: Array,
    inner: Array,
    outer: Array,
    *,
    config: Config | None = None,
    implementation: Implementation | None = None,
) -> Partial:
    """The low-rank state as each query's partial softmax, in float32 (equation 3 there).

    `acc = phi(q) num / total`, `max = log(total)` and `sum = 1` with `total = phi(q) den`: no
    floors. Where `total` is 0 it is the identity of the merge: 0, -1e30, 0. Moves
    `4 B K R (H + 1)` bytes of state, `4 N E (H + R)` of weights (once for all rows), q and acc.

    Args:
      q: rotated, unscaled queries [B, K, G, T, H] of any float type.
      num, den: the state, f32[B, K, R, H] and f32[B, K, R].
      inner, outer: the layers of phi, [N, H, E] and [N, E, R].
      config: the tiling; None takes what `pallas_kernels.tuned.choose` gives.
      implementation: see `pallas_kernels.dispatch.dispatch`.
    """
    expect("q", q, (None,) * 5)
    batch, heads, groups, size, width = q.shape
    _check_state(num, den, batch, heads, width, implementation)
    _check_layers(inner, outer, heads * groups, width, num.shape[2])
    layer = {"width": width, "hidden": inner.shape[2], "rank": num.shape[2]}
    config = config or choose("low_rank_read", heuristic, heads * groups, batch * size, **layer)
    return dispatch(
        implementation,
        reference.low_rank_read,
        functools.partial(_low_rank_read, config=config),
        q, num, den, inner, outer,
    )  # fmt: skip


def low_rank_update(
    num: Array,
    den: Array,
    k: Array,
    v: Array,
    count: Array,
    inner: Array,
    outer: Array,
    mix: Array,
    scale: Array,
    mix_scale: Array,
    *,
    config: Config | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B K R H"], Float[Array, "B K R"]]:
    """`(num, den)` with the first `count[b]` evicted tokens of each row added (equations 4-5).

    The outputs take over the buffers of `num` and `den`: donate them, or XLA copies first. Moves
    `8 B K R (H + 1)` bytes of state, `4 K E (H + R)` of weights (once for all rows while A is
    small), and k and v; where no row of a tile has lost a token nothing is moved.

    Args:
      num, den: the state, f32[B, K, R, H] and f32[B, K, R].
      k, v: [B, K, A, H], keys rotated and unscaled; from `count[b]` on they may be anything.
      count: i32[B].
      inner, outer: the layers of psi, [K, H, E] and [K, E, R].
      mix, scale, mix_scale: W3, s and s' above, [K, R, R], [K, R], [K, R].
      config: the tiling; None takes what `pallas_kernels.tuned.choose` gives.
      implementation: see `pallas_kernels.dispatch.dispatch`.
    """
    expect("k", k, (None,) * 4)
    batch, heads, size, width = k.shape
    expect("v", v, k.shape)
    expect("count", count, (batch,))
    _check_state(num, den, batch, heads, width, implementation)
    rank = num.shape[2]
    _check_layers(inner, outer, heads, width, rank)
    expect("mix", mix, (heads, rank, rank))
    expect("scale", scale, (heads, rank))
    expect("mix_scale", mix_scale, (heads, rank))
    layer = {"width": width, "hidden": inner.shape[2], "rank": rank}
    config = config or choose("low_rank_update", heuristic, heads, batch * size, size, **layer)
    return dispatch(
        implementation,
        reference.low_rank_update,
        functools.partial(_low_rank_update, config=config),
        num, den, k, v, count, inner, outer, mix, scale, mix_scale,
    )  # fmt: skip


def _check_state(
    num: Array, den: Array, batch: int, heads: int, width: int, implementation: str | None
) -> None:
    expect("num", num, (batch, heads, None, width))
    expect("den", den, num.shape[:-1])
    for name, x in (("num", num), ("den", den)):
        if x.dtype != jnp.float32 and implementation != "reference":
            raise ValueError(
                f"{name} must be float32, a sum over thousands of tokens, got {x.dtype}"
            )


def _check_layers(inner: Array, outer: Array, heads: int, width: int, rank: int) -> None:
    expect("inner", inner, (heads, width, None))
    expect("outer", outer, (heads, inner.shape[2], rank))


def _low_rank_read(*args, **options):
    from pallas_kernels.less_state import triton  # a CPU never pays for Pallas

    return triton.low_rank_read(*args, **options)


def _low_rank_update(*args, **options):
    from pallas_kernels.less_state import triton  # a CPU never pays for Pallas

    return triton.low_rank_update(*args, **options)
