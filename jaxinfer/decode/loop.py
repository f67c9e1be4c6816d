"""The compiled programs of generation: prefill a chunk, draw the first token, loop.

`decode` is one `lax.while_loop` over a step; streaming calls the same program for a few steps at a
time. A step reads the last token, draws the next and commits the token that was read, in this
order: the draw is what orders the cache writes behind the reads.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxinfer.cache.context import chain_context
from jaxinfer.cache.policy import Cache
from jaxinfer.config import ModelConfig
from jaxinfer.decode.state import (
    LISTED,
    DecodeState,
    Likeliest,
    Requests,
    chosen_log_probs,
    emit,
    likeliest,
    sampler_now,
    step_keys,
)
from jaxinfer.models.stack import commit, forward, unembed
from jaxinfer.runtime.layout import row_major
from jaxinfer.typing import Params

ROWS_OF_LOGITS = 128  # tokens of a row whose logits are held at once
Step = Callable[[ModelConfig, Params, Requests, DecodeState], DecodeState]


def prefill(
    cfg: ModelConfig,
    params: Params,
    cache: Cache,
    logits: Float[Array, "B V"],
    tokens: Int[Array, "B T"],
    count: Int[Array, " B"],
    reads: bool,
) -> tuple[Cache, Float[Array, "B V"]]:
    """The cache after each row's first `count` tokens, and the logits behind each row's last token.

    Rows with count 0 keep cache and logits. `reads=False` promises that all rows were empty.
    """
    ctx = chain_context(cache.length, count, tokens.shape[1], reads=reads, is_prompt=True)
    out = forward(cfg, params, tokens, cache, ctx, logits="last")
    last = out.hidden[:, :, 0]
    cache = commit(cfg, params, cache, out.fresh, None, count, last, is_prompt=True)
    return cache, jnp.where(count[:, None] > 0, out.logits[:, 0], logits)


def prefill_scored(
    cfg: ModelConfig,
    params: Params,
    cache: Cache,
    logits: Float[Array, "B V"],
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    count: Int[Array, " B"],
    reads: bool,
) -> tuple[Cache, Float[Array, "B V"], Float[Array, "B T"]]:
    """`prefill`, and log p(targets[i] | committed tokens, tokens[: i + 1])."""
    ctx = chain_context(cache.length, count, tokens.shape[1], reads=reads, is_prompt=True)
    out = forward(cfg, params, tokens, cache, ctx, logits="last")
    log_probs, _ = token_log_probs(cfg, params, out.hidden, targets)
    cache = commit(cfg, params, cache, out.fresh, None, count, log_probs, is_prompt=True)
    return cache, jnp.where(count[:, None] > 0, out.logits[:, 0], logits), log_probs


def init_state(
    cache: Cache,
    logits: Float[Array, "B V"],
    seen: Int[Array, "B _"],
    requests: Requests,
    size: int,
) -> DecodeState:
    """A decode state with the first token drawn from the prompt's logits; room for `size`
    tokens."""
    batch = logits.shape[0]
    state = DecodeState(
        cache=cache,
        token=jnp.zeros((batch,), jnp.int32),
        tokens=jnp.zeros((batch, size), jnp.int32),
        log_probs=jnp.zeros((batch, size), jnp.float32),
        written=jnp.zeros((batch,), jnp.int32),
        done=requests.limit <= 0,
        seen=seen,
        steps=jnp.zeros((), jnp.int32),
    )
    if requests.listed is not None:
        shape = (batch, size, min(LISTED, logits.shape[-1]))
        listed = Likeliest(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))
        state = replace(state, likeliest=listed)
    return sample_token(requests, state, logits)[0]


def sample_token(
    requests: Requests, state: DecodeState, logits: Float[Array, "B V"]
) -> tuple[DecodeState, Int[Array, " B"]]:
    """Draws and emits one token per row; also returns the drawn tokens."""
    sampler = sampler_now(requests, state)
    tokens = sampler.sample(step_keys(requests, state), logits, state.seen)
    log_probs = chosen_log_probs(logits, tokens)
    one, found = jnp.ones_like(tokens), likeliest(requests, logits[:, None])
    state, _ = emit(state, requests, tokens[:, None], log_probs[:, None], one, found)
    return state, tokens


def plain_step(
    cfg: ModelConfig, params: Params, requests: Requests, state: DecodeState
) -> DecodeState:
    """One token per row that is not done."""
    active = (~state.done).astype(jnp.int32)
    out = forward(cfg, params, state.token[:, None], state.cache, logits="all")
    cache = state.cache
    state, drawn = sample_token(requests, state, out.logits[:, 0])
    cache = commit(cfg, params, cache, out.fresh, None, active, drawn)
    return replace(state, cache=cache, steps=state.steps + 1)


def decode(
    cfg: ModelConfig,
    params: Params,
    requests: Requests,
    state: DecodeState,
    steps: Int[Array, ""],
    step: Step = plain_step,
) -> DecodeState:
    """Runs at most `steps` steps, until every row is done."""
    end = state.steps + steps

    def unfinished(state: DecodeState) -> Array:
        return (state.steps < end) & ~state.done.all()

    def body(state: DecodeState) -> DecodeState:
        state = step(cfg, params, requests, state)
        return replace(state, cache=replace(state.cache, layers=row_major(state.cache.layers)))

    return jax.lax.while_loop(unfinished, body, state)


def token_log_probs(
    cfg: ModelConfig,
    params: Params,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """log p(targets) in f32 and whether each is the likeliest token.

    Logits are made for at most 128 tokens of a row at a time: never T x V of them.
    """
    batch, size = targets.shape
    part = size if size <= ROWS_OF_LOGITS else math.gcd(size, ROWS_OF_LOGITS)

    def one(piece: tuple[Array, Array]) -> tuple[Array, Array]:
        states, wanted = piece
        logits = unembed(cfg, params, states)
        chosen = jnp.take_along_axis(logits, wanted[..., None], axis=-1)[..., 0]
        best = jnp.argmax(logits, axis=-1) == wanted
        return chosen - jax.nn.logsumexp(logits, axis=-1), best

    pieces = (
        hidden.reshape(batch, size // part, part, -1).swapaxes(0, 1),
        targets.reshape(batch, size // part, part).swapaxes(0, 1),
    )
    log_probs, best = jax.lax.map(one, pieces)
    return (
        log_probs.swapaxes(0, 1).reshape(batch, size),
        best.swapaxes(0, 1).reshape(batch, size),
    )


def read(
    cfg: ModelConfig,
    params: Params,
    cache: Cache,
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    count: Int[Array, " B"],
    keeps: bool = True,
) -> tuple[Cache | None, Float[Array, "B T"], Bool[Array, "B T"]]:
    """log p(targets[i] | committed tokens, tokens[: i + 1]), whether each is the likeliest token,
    and, if it `keeps` them, the cache after `count` tokens."""
    ctx = chain_context(cache.length, count, tokens.shape[1])
    out = forward(cfg, params, tokens, cache, ctx, logits="none")
    log_probs, best = token_log_probs(cfg, params, out.hidden, targets)
    after = commit(cfg, params, cache, out.fresh, None, count, log_probs) if keeps else None
    return after, log_probs, best
