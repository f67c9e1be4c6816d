"""Attention over stored tokens: Pallas kernels on a CUDA device, XLA anywhere else.

`backend` says which, and `pallas_kernels.dispatch.dispatch` chooses: with the implementation None
when a program is lowered; "reference", "triton" and "interpret" name one, which nothing replaces.
Where a kernel does not exist for a format (odd head sizes, ablations of KIVI's grouping), None is
XLA on every device, and naming "triton" or "interpret" is an error.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxinfer.ops.attention import AttentionSpec, Partial
from jaxinfer.runtime.backend import Backend
from jaxinfer.typing import Params
from pallas_kernels import dense_attention as dense
from pallas_kernels.kivi_attention import PackedHalf, kivi_attention
from pallas_kernels.less_state import low_rank_read
from pallas_kernels.softmax_state import ExtraKeys
from pallas_kernels.sparse_heads import sparse_heads


def attend_stored(
    spec: AttentionSpec, q: Array, k: Array, v: Array, distance: Array, visible: Array,
    stop: Array, extra: ExtraKeys | None = None, *, backend: Backend,
) -> Any:  # fmt: skip
    """`partial_attention` over slots of which none from `stop` (i32[]) on is visible; given the
    `extra` keys, the attention output over all, in the dtype of `q`."""
    return dense.dense_attention(
        q, k, v, visible, distance, _rows(stop, q, backend), extra, layout=backend.layout,
        implementation=backend.implementation, **spec.of_scores,
    )  # fmt: skip


def attend_heads(
    spec: AttentionSpec, q: Float[Array, "B K G 1 H"], k: Array, v: Array, length: Array,
    heads: Bool[Array, "B K"], *, backend: Backend,
) -> Partial:  # fmt: skip
    """`partial_attention` of one token a row over its first `length[b]` slots; of the `heads`
    alone, which is all that is read. The others have seen nothing."""
    groups = jnp.where(heads, jnp.arange(heads.shape[1], dtype=jnp.int32), -1)
    every = jnp.full(len(heads), heads.shape[1], jnp.int32)
    found = sparse_heads(
        q[:, :, :, 0].astype(k.dtype), k, v, length, groups, every, scale=spec.scale,
        implementation=backend.implementation,
    )  # fmt: skip
    return Partial(*(jnp.expand_dims(x, 3) for x in found))


def stored_weights(
    spec: AttentionSpec, q: Array, k: Array, distance: Array, visible: Array,
    lse: Float[Array, "B K G T"], stop: Array, *, backend: Backend,
) -> Float[Array, "B K T S"]:  # fmt: skip
    """`key_weights` of such slots."""
    return dense.key_weights(
        q, k, visible, lse, distance, _rows(stop, q, backend), layout=backend.layout,
        implementation=backend.implementation, **spec.of_scores,
    )  # fmt: skip


def attend_packed(
    spec: AttentionSpec, q: Array, keys: PackedHalf, values: PackedHalf, distance: Array,
    visible: Array, stop: Array, extra: ExtraKeys | None = None, *, key_bits: int, value_bits: int,
    backend: Backend,
) -> Any:  # fmt: skip
    """Attention over codes, with `stop` and `extra` as in `attend_stored`."""
    return kivi_attention(
        q, keys, values, visible, distance, _rows(stop, q, backend), extra, key_bits=key_bits,
        value_bits=value_bits, implementation=backend.implementation, **spec.of_scores,
    )  # fmt: skip


def attend_low_rank(
    q: Array, num: Array, den: Array, feature_maps: Params, *, backend: Backend
) -> Partial:
    """LESS's state as queries see it through their feature map."""
    maps = feature_maps["query_inner"], feature_maps["query_outer"]
    return low_rank_read(q, num, den, *maps, implementation=backend.implementation)


def _rows(stop: Array, q: Array, backend: Backend) -> Array | None:
    """`stop` for each row, which saves a kernel reads; XLA masks by visibility alone."""
    if not backend.has_kernels:
        return None
    return jnp.broadcast_to(stop.astype(jnp.int32), q.shape[:1])
