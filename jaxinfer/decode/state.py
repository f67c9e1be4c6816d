"""What a compiled decode loop carries, and how a step emits tokens into it.

Letter: M size of the token buffer; A tokens that one step may emit; E stop tokens.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfer.cache.policy import Cache
from jaxinfer.decode.sampling import SamplerRows
from jaxinfer.typing import Leaf


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Requests:
    """What the rows ask for; constant during decoding. Row b draws with keys[b] alone."""

    sampler: SamplerRows
    keys: Leaf  # PRNG keys [B]
    stop_tokens: Leaf  # i32[B, E], -1 where unused
    limit: Leaf  # i32[B], most tokens to emit


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DecodeState:
    """The state of one batch; donated to every call of the loop."""

    cache: Cache  # holds every token but the last one
    token: Leaf  # i32[B], emitted last, to be read next
    tokens: Leaf  # i32[B, M], the last M emitted
    log_probs: Leaf  # f32[B, M], of the emitted tokens under the model itself
    written: Leaf  # i32[B], number emitted
    done: Leaf  # bool[B]
    seen: Leaf  # bool[B, V], tokens of prompt and output, or bool[B, 1] without a penalty
    steps: Leaf  # i32[], model calls so far
    speculation: Leaf = None  # what speculative steps carry: `jaxinfer.speculative.step`


def step_keys(requests: Requests, state: DecodeState) -> Array:
    """Fresh keys per row, a function of the row's key and of how much it has written."""
    return jax.vmap(jax.random.fold_in)(requests.keys, state.written)


def emit(
    state: DecodeState,
    requests: Requests,
    tokens: Int[Array, "B A"],
    log_probs: Float[Array, "B A"],
    count: Int[Array, " B"],
) -> tuple[DecodeState, Int[Array, " B"]]:
    """The state with each row's first `count` tokens appended, and how many really were.

    The buffers are circular: a text longer than they are must be read out on the way.

    A row ends behind its first stop token or at its limit; rows that are done emit nothing.
    """
    order = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    is_stop = (tokens[:, :, None] == requests.stop_tokens[:, None, :]).any(axis=-1)
    stopped_before = jnp.cumsum(is_stop, axis=1) - is_stop > 0
    room = requests.limit - state.written
    taken = (order < jnp.minimum(count, room)[:, None]) & ~stopped_before & ~state.done[:, None]
    emitted = taken.sum(axis=1, dtype=jnp.int32)

    rows = jnp.arange(tokens.shape[0])[:, None]
    size = state.tokens.shape[1]
    index = jnp.where(taken, (state.written[:, None] + order) % size, size)
    written = state.written + emitted
    last = jnp.take_along_axis(tokens, jnp.maximum(emitted - 1, 0)[:, None], axis=1)[:, 0]
    seen = state.seen
    if seen.shape[1] > 1:
        seen = seen.at[rows, jnp.where(taken, tokens, seen.shape[1])].set(True, mode="drop")
    new = replace(
        state,
        token=jnp.where(emitted > 0, last, state.token),
        tokens=state.tokens.at[rows, index].set(tokens, mode="drop"),
        log_probs=state.log_probs.at[rows, index].set(log_probs, mode="drop"),
        written=written,
        done=state.done | (is_stop & taken).any(axis=1) | (written >= requests.limit),
        seen=seen,
    )
    return new, emitted


def chosen_log_probs(logits: Float[Array, "B V"], tokens: Int[Array, " B"]) -> Float[Array, " B"]:
    """log p(token) under the model, before any sampler setting."""
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)
