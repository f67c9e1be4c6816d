"""Hyena as a layer's mixer: projections, a short filter, gates and long convolutions.

    {"in": LINEAR D -> (n + 1) D, "short": {"taps": [P, S], "bias": [P]},
     "filter": ..., "skip": [F], "modal": {...}?, "out": LINEAR D -> D}

A call convolves its own tokens with the filter, in a chain by FFT or along a tree by masked lags
(laughing_hyena.md 4.5), and adds what the committed text gives at the lags of its tokens: from the
modes' state `Re sum_k R_k lambda_k^depth x_k`, or from the stored inputs. No node of a tree has a
state of its own, and a rejected one has touched none.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinfer.cache.base import Geometry
from jaxinfer.cache.context import CommitContext
from jaxinfer.cache.policy import Policy
from jaxinfer.cache.slots import load
from jaxinfer.config import ModelConfig
from jaxinfer.models.hyena_ahead import looked_ahead
from jaxinfer.models.hyena_call import Call, seen_by
from jaxinfer.models.hyena_params import (
    abstract_layer,
    config_of,
    initialised,
    with_made_filters,
)
from jaxinfer.models.hyena_state import (
    HyenaFresh,
    HyenaPolicy,
    HyenaState,
    bytes_per_row,
    committed,
    empty_state,
)
from jaxinfer.models.mixer import Mixer
from jaxinfer.nn.hyena import operator, short_filter
from jaxinfer.nn.linear import linear
from jaxinfer.typing import Leaf, Params


class Hyena(Mixer):
    """Long convolutions between gates; the state of a layer follows from its parameters."""

    reads_norm = ("in",)

    def abstract_params(self, cfg: ModelConfig, layer: int, dtype) -> Params:
        return abstract_layer(cfg, layer, dtype)

    def initialised(self, cfg: ModelConfig, params: Params, key: jax.Array) -> Params:
        return initialised(cfg, params, key)

    def served(self, cfg: ModelConfig, params: Params) -> Params:
        return with_made_filters(cfg, params)

    def policy(self, cfg: ModelConfig, params: Params, policy: Policy) -> HyenaPolicy:
        return HyenaPolicy.of(cfg, params)

    def reach(self, cfg: ModelConfig, layer: int) -> int | None:
        return cfg.max_positions if cfg.hyena is not None and cfg.hyena.ends(layer) else None

    def init(self, cfg: ModelConfig, policy: Policy, geometry: Geometry, batch: int) -> HyenaState:
        assert isinstance(policy, HyenaPolicy)
        return empty_state(cfg, policy, geometry, batch)

    def read(self, cfg, policy, params, state, x: Float[Array, "B T D"], ctx, prepared, layer):
        own, size = config_of(cfg), x.shape[1]
        p = linear(params["in"], x, ctx.backend)
        depth, waiting = jnp.broadcast_to(ctx.offset, p.shape[:2]), ctx.pending
        if waiting is not None:
            p = jnp.concatenate([waiting.p, p], axis=1)
            depth = jnp.concatenate([waiting.depth, depth], axis=1)
        past = jnp.zeros((len(p), own.short_taps - 1, p.shape[2]), p.dtype)
        # Without a cache, or with nothing in it, there is no text before the call.
        text = state if isinstance(state, HyenaState) and ctx.reads else None
        if text is not None:
            past = load(text.short).astype(p.dtype)
        window, seen = jnp.concatenate([past, p], axis=1), seen_by(ctx, depth, past.shape[1])
        s = short_filter(params["short"], window, seen, size)
        assert isinstance(policy, HyenaPolicy) or text is None
        call = Call.of(cfg, policy, params, text, ctx, depth)
        y, inputs = operator(own, s, call.convolve)
        if waiting is not None:
            inputs = jnp.concatenate([waiting.inputs, inputs], axis=1)
        fresh = HyenaFresh(p=p, inputs=inputs, depth=depth)
        return linear(params["out"], y.astype(x.dtype), ctx.backend), fresh

    def commit(self, cfg, policy, params, state, fresh: HyenaFresh, ctx: CommitContext):
        state = committed(cfg, params, state, fresh, ctx)
        if state.ahead is None:
            return state
        assert isinstance(policy, HyenaPolicy)
        return looked_ahead(cfg, policy, params, state, ctx, fresh.p.shape[1])

    def grow(self, policy: Policy, state: HyenaState, capacity: int) -> HyenaState:
        if state.inputs is None:
            return state
        more = max(capacity - state.inputs.shape[1], 0)
        inputs = jnp.pad(state.inputs, [(0, 0), (0, more), (0, 0)])
        assert isinstance(policy, HyenaPolicy)
        if policy.exact != "tiled" or not more:
            return replace(state, inputs=inputs)
        ahead = jnp.pad(state.ahead, [(0, 0), (0, more), (0, 0), (0, 0)])
        return replace(state, inputs=inputs, ahead=ahead, start=jnp.full_like(state.start, -1))

    def bytes_per_row(self, cfg: ModelConfig, policy: Policy, geometry: Geometry) -> int:
        assert isinstance(policy, HyenaPolicy)
        return bytes_per_row(cfg, policy, geometry)

    def floats_per_token(self, cfg: ModelConfig, keys: int) -> int:
        # Projections twice, an FFT of up to four points a token there and back, and of heads what
        # the text gives to each entry of the outer product.
        own, d = config_of(cfg), cfg.hidden_size
        return 2 * (own.order + 1) * d + 12 * (own.order - 1) * d + d * own.head_size

    def signature(self, params: Params) -> list[Leaf]:
        return [params["in"]["weight"], params["out"]["weight"]]
