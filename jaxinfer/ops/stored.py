"""Attention over stored tokens: Pallas kernels on a CUDA device, XLA anywhere else.

The kernels read caches in the layout that GPUs have here ("BKSH"). `Backend.implementation` None
decides when a program is lowered; "reference", "triton" and "interpret" name one, which nothing
replaces. Where a kernel does not exist for a format (odd head sizes, ablations of KIVI's grouping),
None is XLA on every device, and naming "triton" or "interpret" is an error. The
kernels are imported where a program is traced for them: a CPU never pays for Pallas.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinfer.ops.attention import AttentionSpec, Partial, key_weights, partial_attention
from jaxinfer.runtime.backend import Backend
from jaxinfer.typing import Params
from pallas_kernels.dispatch import dispatch, implementation_of
from pallas_kernels.softmax_state import ExtraKeys, attended


def attend_stored(
    spec: AttentionSpec, q: Array, k: Array, v: Array, distance: Array, visible: Array,
    stop: Array, extra: ExtraKeys | None = None, *, backend: Backend,
) -> Any:  # fmt: skip
    """`partial_attention` over slots of which none from `stop` (i32[]) on is visible; given the
    `extra` of the keys, the attention output over all, in the dtype of `q`."""

    def reference(q, k, v, distance, visible, stop, extra):
        del stop
        return ended(partial_attention(spec, q, k, v, distance, visible, backend.layout), extra, q)

    def kernel(q, k, v, distance, visible, stop, extra, *, interpret):
        from pallas_kernels.dense_attention import dense_attention

        return dense_attention(
            q, k, v, *_masks(spec, q, distance, visible, stop), extra,
            implementation=implementation_of(interpret), **_form(spec),
        )  # fmt: skip

    args = q, k, v, distance, visible, stop, extra
    return _as_partial(dispatch(backend.implementation, reference, kernel, *args))


def stored_weights(
    spec: AttentionSpec, q: Array, k: Array, distance: Array, visible: Array,
    lse: Float[Array, "B K G T"], stop: Array, *, backend: Backend,
) -> Float[Array, "B K T S"]:  # fmt: skip
    """`key_weights` of such slots."""

    def reference(q, k, distance, visible, lse, stop):
        del stop
        return key_weights(spec, q, k, distance, visible, lse, backend.layout)

    def kernel(q, k, distance, visible, lse, stop, *, interpret):
        from pallas_kernels.dense_attention import key_weights

        visible, distance, stop = _masks(spec, q, distance, visible, stop)
        return key_weights(
            q, k, visible, lse, distance, stop, implementation=implementation_of(interpret),
            **_form(spec),
        )  # fmt: skip

    args = q, k, distance, visible, lse, stop
    return dispatch(backend.implementation, reference, kernel, *args)


def attend_packed(
    spec: AttentionSpec, q: Array, keys: Any, values: Any, distance: Array,
    visible: Array, stop: Array, extra: ExtraKeys | None = None, *, key_bits: int, value_bits: int,
    reference, backend: Backend,
) -> Any:  # fmt: skip
    """Attention over codes, `PackedHalf`s of `pallas_kernels.kivi_attention`, with `extra` as in
    `attend_stored`; `reference` of queries, codes and masks unpacks and attends."""

    def unpacking(q, keys, values, distance, visible, stop, extra):
        del stop
        return ended(reference(q, keys, values, distance, visible), extra, q)

    def kernel(q, keys, values, distance, visible, stop, extra, *, interpret):
        from pallas_kernels.kivi_attention import kivi_attention

        return kivi_attention(
            q, keys, values, *_masks(spec, q, distance, visible, stop), extra, key_bits=key_bits,
            value_bits=value_bits, implementation=implementation_of(interpret), **_form(spec),
        )  # fmt: skip

    args = q, keys, values, distance, visible, stop, extra
    return _as_partial(dispatch(backend.implementation, unpacking, kernel, *args))


def attend_low_rank(
    q: Array, num: Array, den: Array, kernels: Params, *, reference: Callable[..., Any],
    backend: Backend,
) -> Partial:  # fmt: skip
    """LESS's state (float32) as queries see it through their feature map; `reference` of the four
    gives the same."""

    def kernel(q, num, den, kernels, *, interpret):
        from pallas_kernels.less_state import low_rank_read

        maps = kernels["query_inner"], kernels["query_outer"]
        return low_rank_read(q, num, den, *maps, implementation=implementation_of(interpret))

    def unnamed(*args):
        return tuple(reference(*args))

    return Partial(*dispatch(backend.implementation, unnamed, kernel, q, num, den, kernels))


def ended(state: Partial, extra: ExtraKeys | None, q: Array) -> Any:
    """The state as a tuple, or with the `extra` of the keys the attention output."""
    return tuple(state) if extra is None else attended(state, extra, q.dtype)


def _as_partial(found: Any) -> Any:
    """What `dispatch` returned: a state is a tuple there."""
    return Partial(*found) if isinstance(found, tuple | list) else found


def _masks(spec: AttentionSpec, q: Array, distance: Array, visible: Array, stop: Array):
    rows = jnp.broadcast_to(stop.astype(jnp.int32), q.shape[:1])
    return visible, (None if spec.slopes is None else distance), rows


def _form(spec: AttentionSpec) -> dict:
    return {"scale": spec.scale, "softcap": spec.softcap, "slopes": spec.slopes}
