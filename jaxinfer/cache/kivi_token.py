"""A decode step's push into KIVI (arXiv 2402.02750): one token a row, on a GPU in one launch.

What it writes is no more than two tokens and, once in R steps, a block of keys; as XLA's kernels it
is about eleven launches in every layer and step.
"""

from dataclasses import replace
from typing import Any

from jaxtyping import Array, Int

from jaxinfer.cache.base import write_index
from jaxinfer.cache.slots import Slots
from jaxinfer.ops.stored_writes import push_token


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
    flush: str,
) -> Any:  # fmt: skip
    """The `KiviState` with the one token in the slots `fresh` behind the `n_in` ones of each row
    whose `count` is 1."""
    keys, values, tail = state.keys, state.values, state.tail
    new = push_token(
        keys.half, values.half, tail.k, tail.v, fresh.k, fresh.v, n_in,
        write_index(count, 1, after),  # the kernel writes in place
        key_bits=keys.format.bits, value_bits=values.format.bits, flush=flush,
        backend=tail.backend,
    )  # fmt: skip
    return replace(
        state,
        keys=keys.of(new.keys),
        values=values.of(new.values),
        tail=replace(tail, k=new.tail_k, v=new.tail_v),
    )
