"""A decode step's push into KIVI (arXiv 2402.02750): one token a row, on a GPU in one launch.

What it writes is no more than two tokens and, once in R steps, a block of keys; as XLA's kernels it
is about eleven launches in every layer and step.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from jaxtyping import Array, Int

from jaxinfer.cache.base import write_index
from jaxinfer.cache.slots import Slots
from jaxinfer.ops.stored_writes import push_token
from jaxinfer.runtime.backend import Backend


def has_kernel(state: Any, fresh: Slots) -> bool:
    """Whether there is one for so many tokens, and for the formats of the `KiviState`."""
    tail = state.tail
    return (
        fresh.capacity == 1
        and tail.backend.has_kernels
        and all(
            half.tokens and half.format.has_kernel(tail.v.shape[3])
            for half in (state.keys, state.values)
        )
    )


def put_token(
    state: Any, fresh: Slots, n_in: Int[Array, " B"], count: Int[Array, " B"], after: Array, *,
    flush: str, put_any: Callable[..., Any],
) -> Any:  # fmt: skip
    """`put_any(state, fresh, n_in, count, after)`, which is what other devices do."""
    backend = state.tail.backend

    def on(backend: Backend, state: Any) -> Any:
        return replace(state, tail=replace(state.tail, backend=backend))

    def reference(state, fresh, n_in, count):
        by_xla = replace(backend, implementation="reference")
        return on(backend, put_any(on(by_xla, state), fresh, n_in, count, count))

    return push_token(
        state, fresh, n_in,
        write_index(count, 1, after),  # the kernel writes in place
        flush=flush, reference=reference, backend=backend,
    )  # fmt: skip
