"""Attention over selected key/value heads (DejaVu, arXiv 2310.17157, section 4.2).

A key/value head is selected together with all query heads that share it: else no byte of the cache
is saved. Axis letters: B rows, K key/value heads, G query heads of each, S slots, H head size, cap
entries of a list.
"""

import functools

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.shapes import expect
from pallas_kernels.softmax_state import Partial
from pallas_kernels.sparse_heads import reference
from pallas_kernels.sparse_heads.configs import Config, heuristic
from pallas_kernels.tuned import choose


def sparse_heads(
    q: Array,
    k: Array,
    v: Array,
    length: Array,
    groups: Array,
    count: Array,
    *,
    scale: float,
    config: Config | None = None,
    implementation: Implementation | None = None,
) -> Partial:
    """The softmax state, in float32, of one token's selected heads over the slots below `length`.

    Heads that are not selected have the identity: acc 0, max -1e30, sum 0. Their keys and values
    are not read.

    Args:
      q: float[B, K, G, H].
      k, v: float[B, K, S, H], of the dtype of q.
      length: int[B], at most S.
      groups: int[B, cap], the selected key/value heads of each row in any order; -1 selects none,
        and entries from `count` on are not looked at.
      count: int[B].
      scale: what scores are multiplied by.
      config: the tiling; None takes what `pallas_kernels.tuned.choose` gives.
      implementation: see `pallas_kernels.dispatch.dispatch`.

    Raises:
      ValueError: if a shape or dtype does not fit.
    """
    expect("q", q, (None, None, None, None))
    batch, heads, rows, width = q.shape
    expect("k", k, (batch, heads, None, width))
    expect("v", v, k.shape)
    expect("length", length, (batch,))
    expect("groups", groups, (batch, None))
    expect("count", count, (batch,))
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name} must have the dtype of q, {q.dtype}, got {x.dtype}")
    for name, x in (("length", length), ("groups", groups), ("count", count)):
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"{name} must be integers, got {x.dtype}")
    sizes = (batch, min(groups.shape[1], heads), rows, k.shape[2], width)
    config = config or choose("sparse_heads", heuristic, *sizes, itemsize=q.dtype.itemsize)
    return dispatch(
        implementation,
        functools.partial(reference.sparse_heads, scale=scale),
        functools.partial(_sparse_heads, scale=scale, config=config),
        q, k, v, *(x.astype(jnp.int32) for x in (length, groups, count)),
    )  # fmt: skip


def _sparse_heads(*args, **options):
    from pallas_kernels.sparse_heads import triton  # a CPU never pays for Pallas

    return triton.sparse_heads(*args, **options)
