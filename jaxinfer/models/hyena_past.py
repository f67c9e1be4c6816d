"""What the committed text of a Hyena layer gives to the tokens of a call.

Axis letters: C channels of a stage, F filters of a stage (C = F N), K modes, S stored tokens, Q
lags: how far tokens may stand behind the text.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfer.hyena_config import HyenaConfig
from jaxinfer.models.hyena_state import HyenaState
from jaxinfer.nn.hyena import modal_part
from jaxinfer.nn.modal import lag_tables
from jaxinfer.ops.long_convolution import fft_convolution, fft_outer
from jaxinfer.typing import Params

FEW = 8
"""Tokens behind the text for which it is multiplied lag by lag, without an FFT."""


def from_modes(
    cfg: HyenaConfig,
    params: Params,
    state: HyenaState,
    stage: int,
    query: Float[Array, "B T C"],
    lags: int,
    depth: Int[Array, "B T"] | None,
) -> Float[Array, "B T C"]:
    """`Re sum_k R_k lambda_k^depth x_k`, with depth None the place in a chain.

    Lags are rows and columns of `jaxinfer.nn.modal.lag_tables`: no array has K and all of them.
    """
    modal = modal_part(params)
    assert modal is not None
    own = slice(stage, None, cfg.order - 1)
    of_stage = jax.tree.map(lambda x: x[own], modal)
    (far_re, far_im), (near_re, near_im) = lag_tables(of_stage, lags)
    re, im = (x[:, own, ..., None] for x in (state.re, state.im))  # [B, F, E, K, 1]
    far_re, far_im = far_re[:, None], far_im[:, None]
    far_re, far_im = far_re * re - far_im * im, far_re * im + far_im * re

    def product(x: Array, y: Array) -> Array:
        return jnp.einsum("bfeki,fkj->bfeij", x, y, precision="highest")

    w = product(far_re, near_re) - product(far_im, near_im)
    w = w.reshape(*w.shape[:3], -1)[..., :lags]  # [B, F, E, Q]
    if depth is None:
        w = w[..., w.shape[-1] - query.shape[1] :]
    else:
        w = jnp.take_along_axis(w, depth[:, None, None], axis=-1)
    return contracted(cfg, w, query)


def from_inputs(
    cfg: HyenaConfig,
    h: Float[Array, "F L"],
    inputs: Float[Array, "B S I"],
    length: Int[Array, " B"],
    query: Float[Array, "B T C"],
    lags: int,
    depth: Int[Array, "B T"] | None,
) -> Float[Array, "B T C"]:
    """The convolution of the first `length` inputs, at so many lags behind them."""
    inputs = inputs.astype(jnp.promote_types(inputs.dtype, jnp.float32))
    stored = jnp.arange(inputs.shape[1])
    if depth is None and lags > FEW:
        inputs = jnp.where((stored < length[:, None])[..., None], inputs, 0)
        return _by_fft(cfg, h, inputs, length, query)
    if depth is None:
        depth = jnp.broadcast_to(jnp.arange(lags)[lags - query.shape[1] :], query.shape[:2])
    lag = length[:, None] - stored  # of the first token behind the text
    parts = [_at_lag(cfg, h, inputs, lag, query, depth, step) for step in range(lags)]
    return sum(parts[1:], parts[0])


def _at_lag(cfg, h: Array, inputs: Array, lag: Array, query: Array, depth: Array, step: int):
    """What tokens of depth `step` get, zero for the others.

    Of slots that hold no token of the text only the weights are zero: no copy of all inputs.
    """
    at = lag + step
    known = (lag > 0) & (at < h.shape[1])
    weights = jnp.where(known, h[:, jnp.clip(at, 0, h.shape[1] - 1)], 0)  # [F, B, S]
    here = (depth == step)[..., None]
    if cfg.head_size == 1:
        found = (jnp.moveaxis(weights, 0, -1) * inputs).sum(axis=1)
        return jnp.where(here, found[:, None], 0)
    k, v = (_heads(cfg, x) for x in jnp.split(inputs, 2, axis=-1))
    w = jnp.einsum("fbs,bsfi,bsfj->bfij", weights, k, v, precision="highest")
    found = jnp.einsum("btfi,bfij->btfj", _heads(cfg, query), w, precision="highest")
    return jnp.where(here, found.reshape(query.shape), 0)


def _by_fft(cfg: HyenaConfig, h: Array, inputs: Array, length: Array, query: Array) -> Array:
    size = query.shape[1]
    longer = jnp.pad(inputs, [(0, 0), (0, size), (0, 0)])
    index = (length[:, None] + jnp.arange(size))[..., None]
    if cfg.head_size == 1:
        return jnp.take_along_axis(fft_convolution(longer, h), index, axis=1)
    rows = jnp.arange(len(query))[:, None]
    queries = jnp.zeros((*longer.shape[:2], query.shape[2]), query.dtype)
    queries = queries.at[rows, index[..., 0]].set(query)
    k, v = jnp.split(longer, 2, axis=-1)
    return jnp.take_along_axis(fft_outer(queries, k, v, h), index, axis=1)


def contracted(cfg: HyenaConfig, w: Array, query: Array) -> Float[Array, "B T C"]:
    """Sums the key index of w f32[B, F, E, T] with the queries."""
    if cfg.head_size == 1:
        return w[:, :, 0].swapaxes(1, 2)
    split = (*w.shape[:2], cfg.head_size, cfg.head_size, -1)
    found = jnp.einsum(
        "btfi,bfijt->btfj", _heads(cfg, query), w.reshape(split), precision="highest"
    )
    return found.reshape(query.shape)


def _heads(cfg: HyenaConfig, x: Array) -> Float[Array, "B T F N"]:
    return x.reshape(*x.shape[:2], -1, cfg.head_size)
