"""What a compiled decode loop carries, and how a step emits tokens into it.

Letter: M size of the token buffer; A tokens that one step may emit; E stop tokens; C likeliest
tokens that are listed.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfer.cache.policy import Cache
from jaxinfer.decode.sampling import SamplerRows
from jaxinfer.typing import Leaf

LISTED = 20  # likeliest tokens that a row may ask for


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Requests:
    """What the rows ask for; constant during decoding. Row b draws with keys[b] alone.

    The last three are there where rows come and go (`jaxinfer.decode.slot_requests`), and count
    when `sampler.features.mask` is set.
    """

    sampler: SamplerRows
    keys: Leaf  # PRNG keys [B]
    stop_tokens: Leaf  # i32[B, E], -1 where unused
    limit: Leaf  # i32[B], most tokens to emit
    min_tokens: Leaf = None  # i32[B], tokens before which no stop token is drawn
    listed: Leaf = None  # i32[B], how many of the likeliest tokens to list
    one_by_one: Leaf = None  # bool[B], emits one token a step: its mask holds for the next only


class Likeliest(NamedTuple):
    """The likeliest tokens at each place, the best first."""

    tokens: Leaf  # i32[B, M|A, C]
    log_probs: Leaf  # f32[B, M|A, C], under the model itself


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
    seen: Leaf  # i32[B, V], how often each token was generated, IN_PROMPT more for the prompt's;
    # i32[B, 1] without a penalty
    steps: Leaf  # i32[], model calls so far
    speculation: Leaf = None  # what speculative steps carry: `jaxinfer.speculative.step`
    likeliest: Leaf = None  # `Likeliest` [B, M, C], where rows may ask for it


def step_keys(requests: Requests, state: DecodeState) -> Array:
    """Fresh keys per row, a function of the row's key and of how much it has written."""
    return jax.vmap(jax.random.fold_in)(requests.keys, state.written)


def sampler_now(requests: Requests, state: DecodeState) -> SamplerRows:
    """The rows' samplers in this step, in which a row that is too short draws no stop token."""
    sampler = requests.sampler
    if requests.min_tokens is None or not sampler.features.mask:
        return sampler
    stops, unused = requests.stop_tokens, jnp.int32(state.seen.shape[1])
    banned = (state.written < requests.min_tokens)[:, None] & (stops >= 0)
    return replace(sampler, banned=jnp.where(banned, stops, unused))


def likeliest(requests: Requests, logits: Float[Array, "B A V"]) -> Likeliest | None:
    """The likeliest tokens at each place, if any row asks for them; None where none can."""
    if requests.listed is None or not requests.sampler.features.mask:
        return None
    count = min(LISTED, logits.shape[-1])

    def find() -> Likeliest:
        best, tokens = jax.lax.top_k(logits, count)
        best = best - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        return Likeliest(tokens.astype(jnp.int32), best)

    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(find))
    return jax.lax.cond((requests.listed > 0).any(), find, lambda: empty)


def emit(
    state: DecodeState,
    requests: Requests,
    tokens: Int[Array, "B A"],
    log_probs: Float[Array, "B A"],
    count: Int[Array, " B"],
    found: Likeliest | None = None,
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
        seen = seen.at[rows, jnp.where(taken, tokens, seen.shape[1])].add(1, mode="drop")
    listed = state.likeliest
    if listed is not None and found is not None:
        listed = jax.tree.map(lambda x, new: x.at[rows, index].set(new, mode="drop"), listed, found)
    new = replace(
        state,
        token=jnp.where(emitted > 0, last, state.token),
        tokens=state.tokens.at[rows, index].set(tokens, mode="drop"),
        log_probs=state.log_probs.at[rows, index].set(log_probs, mode="drop"),
        written=written,
        done=state.done | (is_stop & taken).any(axis=1) | (written >= requests.limit),
        seen=seen,
        likeliest=listed,
    )
    return new, emitted


def chosen_log_probs(logits: Float[Array, "B V"], tokens: Int[Array, " B"]) -> Float[Array, " B"]:
    """log p(token) under the model, before any sampler setting."""
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)
