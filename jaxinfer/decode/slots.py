"""Rows that enter and leave a running decode state.

Every leaf of `DecodeState` and `Requests` has the row first (only `steps` counts for all), and a
row's draws depend on its own seed and length, so a row is put into a slot by writing its part of
each leaf, and its text is the same there as alone. All is pure; the slot is dynamic, so that one
compiled program serves all of them, and the state is updated in place.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxinfer.cache.policy import Cache
from jaxinfer.decode.engine import Engine
from jaxinfer.decode.loop import prefill_scored
from jaxinfer.decode.state import DecodeState, Requests
from jaxinfer.runtime.program import Program

Tree = TypeVar("Tree")


class Row(NamedTuple):
    """One row that is ready to decode: a state of one row and what it asks for."""

    state: DecodeState
    requests: Requests


def insert(
    state: DecodeState, requests: Requests, row: Row, slot: Int[Array, ""]
) -> tuple[DecodeState, Requests]:
    """The state with `row` in a slot, whatever was there; capacities must be alike."""
    rows = (replace(state, steps=None), requests)
    one = (replace(row.state, steps=None), row.requests)
    rows, requests = jax.tree.map(
        lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, slot, axis=0), rows, one
    )
    return replace(rows, steps=state.steps), requests


def free(state: DecodeState, slot: Int[Array, ""]) -> DecodeState:
    """The state with an empty slot, which is done and which no step reads: attention goes as far as
    the longest row."""
    state = replace(state, done=state.done.at[slot].set(True))
    return _with_caches(lambda x: replace(x, length=x.length.at[slot].set(0)), state)


def resize(
    state: DecodeState, requests: Requests, order: Int[Array, " N"]
) -> tuple[DecodeState, Requests]:
    """A state of N slots, of which slot i holds what slot `order[i]` held; -1 leaves it empty.

    What stays is moved once: a new state is the one thing here that cannot be made in place.
    """
    size, empty = order.shape[0], order < 0
    source = jnp.maximum(order, 0)

    def moved(x: Array) -> Array:
        parts = [jax.lax.dynamic_slice_in_dim(x, source[i], 1, axis=0) for i in range(size)]
        return jnp.concatenate(parts, axis=0)

    steps, state = state.steps, replace(state, steps=None)
    state, requests = jax.tree.map(moved, (state, requests))
    state = replace(state, steps=steps, done=state.done | empty)
    return _with_caches(lambda x: replace(x, length=jnp.where(empty, 0, x.length)), state), requests


def row_of(cache: Cache, row: Int[Array, ""], length: Int[Array, ""]) -> Cache:
    """A copy of one row, cut to its first `length` tokens where that is fewer than it has
    (`Policy.can_truncate`)."""
    one = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1, axis=0), cache)
    return replace(one, length=length[None])


def allow(requests: Requests, words: Int[Array, " W"], slot: Int[Array, ""]) -> Requests:
    """The requests with another mask of allowed tokens (`jaxinfer.decode.token_mask`) in a slot."""
    sampler = requests.sampler
    allowed = jax.lax.dynamic_update_slice_in_dim(sampler.allowed, words[None], slot, axis=0)
    return replace(requests, sampler=replace(sampler, allowed=allowed))


def slot_programs(engine: Engine) -> dict[str, Program]:
    """The engine's programs, with those of slots among them."""
    programs = engine.programs
    for name, function, static, donated in (
        ("insert", insert, (), ("state",)),
        ("free", free, (), ("state",)),
        ("resize", resize, (), ()),
        ("allow", allow, (), ()),
        ("row_of", row_of, (), ()),
        ("prefill_scored", prefill_scored, ("cfg", "reads"), ("cache", "logits")),
    ):
        if name not in programs:
            programs[name] = Program(
                function, static_argnames=static, donate_argnames=donated, name=name
            )
    return programs


def _with_caches(change: Callable[[Cache], Cache], tree: Tree) -> Tree:
    """The tree with every cache in it changed, a draft's too."""
    is_cache = lambda x: isinstance(x, Cache)  # noqa: E731
    return jax.tree.map(lambda x: change(x) if is_cache(x) else x, tree, is_leaf=is_cache)
