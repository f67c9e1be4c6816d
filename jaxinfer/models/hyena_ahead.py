"""Exact convolutions of stored inputs, done ahead of the tokens that will need them.

The past's part of an output, `sum_(s<t) h_(t-s) u_s`, costs t products where it is summed at t. Two
forms do less work for the same numbers. Both keep an array `ahead` of such parts for tokens to
come, which one transform of the whole text fills behind a prompt or a chunk of it, at `start`:

- tiled (Flash Inference, arXiv 2410.12982; continuous FutureFill, 2410.03766): with the i-th token
  behind `start`, and P the largest power of two in i, the last P inputs are convolved with lags 1
  to 2 P - 1 and added to the next P outputs. A circular convolution of 2 P points is enough. Token
  t costs log(t)^2 on average; `ahead` has a slot a token.
- epoched (FutureFill): every Q tokens one transform of the text fills the next Q outputs; in
  between come the at most Q inputs behind `start`. Token t costs sqrt(t log t); `ahead` has Q
  slots.

Rows that started together share a clock and so the sizes of their tiles; each size is a branch that
runs if any row needs it.

Axis letters: S stored tokens, P a tile's, Q outputs ahead, F filters, E entries under each, I
inputs of the convolutions a token, C channels of a stage.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxinfer.cache.base import write_index
from jaxinfer.cache.context import CommitContext
from jaxinfer.cache.slots import load
from jaxinfer.config import ModelConfig
from jaxinfer.models.hyena_params import config_of
from jaxinfer.models.hyena_past import contracted, from_inputs
from jaxinfer.models.hyena_prefill import entries
from jaxinfer.models.hyena_state import HyenaPolicy, HyenaState
from jaxinfer.nn.hyena import response
from jaxinfer.ops.long_convolution import fft_convolution
from jaxinfer.typing import Params

FEW = 8
"""Tokens of a tile that a Toeplitz matrix takes."""


def from_ahead(
    cfg: ModelConfig,
    policy: HyenaPolicy,
    params: Params,
    state: HyenaState,
    length: Int[Array, " B"],
    stage: int,
    query: Float[Array, "B 1 C"],
) -> Float[Array, "B 1 C"]:
    """What the committed text gives to the one token behind it."""
    own = config_of(cfg)
    stages = slice(stage, None, own.order - 1)
    behind = length - state.start
    slot = length if policy.exact == "tiled" else behind
    w = jnp.take_along_axis(state.ahead, slot[:, None, None, None], axis=1)
    found = contracted(own, jnp.moveaxis(w[:, :, stages], 1, -1), query)
    if policy.exact == "tiled":
        return found
    size = state.ahead.shape[1]
    index = jnp.minimum(state.start[:, None] + jnp.arange(size), state.inputs.shape[1] - 1)
    recent = _floats(jnp.take_along_axis(state.inputs, index[..., None], axis=1))
    recent = recent if own.head_size > 1 else recent[..., stages]
    h = response(own, params, size, cfg.max_positions, skip=False)[stages]
    return found + from_inputs(own, h, recent, behind, query, 1, None)


def looked_ahead(
    cfg: ModelConfig, policy: HyenaPolicy, params: Params, state: HyenaState, ctx: CommitContext,
    size: int,
) -> HyenaState:  # fmt: skip
    """The state with what the accepted tokens, of `size` and stored already, give to later ones."""
    ends = ctx.length + ctx.count
    # Behind the reads, as XLA must see: its first row is 0, and no index of a text is larger.
    ends = ends + write_index(jnp.zeros_like(ends), 0, ctx.after)
    is_new = ctx.count > 0
    if size > 1:
        return _started(cfg, policy, params, state, ends, is_new)
    tokens = ends - state.start
    if policy.exact == "epoched":
        starts = is_new & (tokens >= state.ahead.shape[1])
    else:
        starts = is_new & (state.start < 0)
    state = jax.lax.cond(
        starts.any(), lambda: _started(cfg, policy, params, state, ends, starts), lambda: state
    )
    if policy.exact == "epoched":
        return state
    tokens = jnp.where(is_new & ~starts, tokens, 0)
    ahead, tile = state.ahead, 1
    while tile <= state.inputs.shape[1]:
        rows = (tokens & -tokens) == tile
        ahead = jax.lax.cond(
            rows.any(),
            lambda ahead, tile=tile, rows=rows: _with_tile(
                cfg, params, ahead, state.inputs, tile, ends, rows
            ),
            lambda ahead: ahead,
            ahead,
        )
        tile *= 2
    return replace(state, ahead=ahead)


def _with_tile(
    cfg: ModelConfig,
    params: Params,
    ahead: Float[Array, "B Q F E"],
    inputs: Array,
    tile: int,
    ends: Int[Array, " B"],
    rows: Bool[Array, " B"],
) -> Float[Array, "B Q F E"]:
    """`ahead` with what the last `tile` tokens of these rows give to the next `tile`."""
    index = jnp.maximum(ends[:, None] - tile + jnp.arange(tile), 0)
    u = entries(cfg, _floats(jnp.take_along_axis(inputs, index[..., None], axis=1)))
    h = response(config_of(cfg), params, 2 * tile, cfg.max_positions, skip=False)
    slots = ahead.shape[1]
    target = jnp.where(rows[:, None], ends[:, None] + jnp.arange(tile), slots)
    found = convolved_tile(u, h)
    at = jnp.arange(len(ahead))[:, None], jnp.minimum(target, slots)
    return ahead.at[at].add(found, mode="drop")


def convolved_tile(u: Float[Array, "B P F E"], h: Float[Array, "F L"]) -> Float[Array, "B P F E"]:
    """What P tokens give to the next P, of the filter's lags 0 to 2 P - 1."""
    tile = u.shape[1]
    if tile <= FEW:
        lag = tile + jnp.arange(tile)[:, None] - jnp.arange(tile)
        return jnp.einsum("fts,bsfe->btfe", h[:, lag], u, precision="highest")
    spectrum = jnp.fft.rfft(h, 2 * tile)[:, None]
    found = jnp.fft.irfft(jnp.fft.rfft(jnp.moveaxis(u, 1, -1), 2 * tile) * spectrum, 2 * tile)
    return jnp.moveaxis(found[..., tile:], -1, 1)


def _started(
    cfg: ModelConfig, policy: HyenaPolicy, params: Params, state: HyenaState,
    ends: Int[Array, " B"], rows: Bool[Array, " B"],
) -> HyenaState:  # fmt: skip
    """These rows with what their whole text gives to all outputs of `ahead`."""
    own, (capacity, slots) = config_of(cfg), (state.inputs.shape[1], state.ahead.shape[1])
    stored = jnp.arange(capacity) < ends[:, None]
    inputs = jnp.where(stored[..., None], _floats(state.inputs), 0)
    if policy.exact == "tiled":
        index = jnp.broadcast_to(jnp.arange(slots), (len(ends), slots))
    else:
        index = ends[:, None] + jnp.arange(slots)
    longer, positions = jnp.pad(inputs, [(0, 0), (0, slots), (0, 0)]), cfg.max_positions
    h = response(own, params, min(longer.shape[1], positions), positions, skip=False)

    def outputs(u: Array, h: Array) -> Array:
        return jnp.take_along_axis(fft_convolution(u, h), index[..., None], axis=1)

    if own.head_size == 1:
        ahead = outputs(longer, h)[..., None]
    else:
        k, v = jnp.split(longer, 2, axis=-1)
        heads = (*k.shape[:2], -1, own.head_size)
        wide = jnp.repeat(h, own.head_size, axis=0)

        def of_key(key: Array) -> Array:  # [B, S, F], one index of all heads' keys
            return outputs((key[..., None] * v.reshape(heads)).reshape(v.shape), wide)

        rows_of = jax.lax.map(of_key, jnp.moveaxis(k.reshape(heads), -1, 0))
        ahead = jnp.moveaxis(rows_of, 0, -1).reshape(*index.shape, -1, own.head_size, own.head_size)
        ahead = ahead.swapaxes(-1, -2).reshape(*index.shape, len(h), -1)
    return replace(
        state,
        ahead=jnp.where(rows[:, None, None, None], ahead, state.ahead),
        start=jnp.where(rows, ends, state.start),
    )


def _floats(stored: Array) -> Array:
    found = load(stored)
    return found.astype(jnp.promote_types(found.dtype, jnp.float32))
