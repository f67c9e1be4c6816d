"""The convolutions of one call of a Hyena layer: over its own tokens, and over the committed text.

Axis letters: F filters of a layer, L lags, I inputs of the convolutions a token, C channels of a
stage.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfer.cache.context import StepContext
from jaxinfer.cache.policy import Policy
from jaxinfer.cache.slots import load
from jaxinfer.config import ModelConfig
from jaxinfer.models.hyena_ahead import from_ahead
from jaxinfer.models.hyena_params import config_of
from jaxinfer.models.hyena_past import from_inputs, from_modes
from jaxinfer.models.hyena_state import HyenaFresh, HyenaPolicy, HyenaState
from jaxinfer.nn.hyena import response
from jaxinfer.ops.long_convolution import (
    Seen,
    causal_convolution,
    outer_convolution,
    seen_convolution,
    seen_outer,
)
from jaxinfer.typing import Params


@dataclass(frozen=True, kw_only=True)
class Call:
    """What the stages of one layer's operator have in common; `convolve` is one of them."""

    cfg: ModelConfig
    policy: Policy
    params: Params
    text: HyenaState | None
    waiting: HyenaFresh | None
    length: Int[Array, " B"]
    depth: Int[Array, "B T"]  # of this call's tokens
    seen: Seen | None  # in a tree
    lags: int  # one more than the largest depth
    h: Float[Array, "F L"]

    @classmethod
    def of(
        cls, cfg: ModelConfig, policy: Policy, params: Params, text: HyenaState | None,
        ctx: StepContext, depth: Int[Array, "B A"],
    ) -> "Call":  # fmt: skip
        size = ctx.offset.shape[1]
        delayed = 0 if text is None or text.delayed is None else text.delayed.shape[1]
        levels = size if ctx.levels is None else len(ctx.levels) - 1
        lags = depth.shape[1] - size + levels
        return cls(
            cfg=cfg, policy=policy, params=params, text=text, waiting=ctx.pending,
            length=ctx.length,
            depth=depth[:, depth.shape[1] - size :], seen=seen_by(ctx, depth, delayed), lags=lags,
            h=_own_response(cfg, params, ctx, delayed + lags),
        )  # fmt: skip

    def convolve(
        self, stage: int, query: Float[Array, "B T C"], inputs: Float[Array, "B T _"]
    ) -> Float[Array, "B T C"]:
        """What stage `stage` makes of its inputs, for its queries."""
        own, size = config_of(self.cfg), inputs.shape[1]
        before = [] if self.text is None or self.text.delayed is None else [self.text.delayed]
        before += [] if self.waiting is None else [self.waiting.inputs]
        inputs = jnp.concatenate([*(self._of(stage, x) for x in before), inputs], axis=1)
        h = self.h[stage :: own.order - 1]
        if own.head_size == 1:
            if self.seen is None:
                found = causal_convolution(inputs, h, size)
            else:
                found = seen_convolution(inputs, h, self.seen)
        else:
            k, v = jnp.split(inputs, 2, axis=-1)
            if self.seen is None:
                found = outer_convolution(query, k, v, h)
            else:
                found = seen_outer(query, k, v, h, self.seen)
        if self.text is None or self.text.past_is_delayed:
            return found
        return found + self._past(self.text, stage, query)

    def _past(self, text: HyenaState, stage: int, query: Array) -> Array:
        own = config_of(self.cfg)
        depth = None if self.seen is None else self.depth
        if text.inputs is None:
            return from_modes(own, self.params, text, stage, query, self.lags, depth)
        if text.ahead is not None and self.lags == 1:
            assert isinstance(self.policy, HyenaPolicy)
            return from_ahead(self.cfg, self.policy, self.params, text, self.length, stage, query)
        positions = self.cfg.max_positions
        h = response(own, self.params, positions, positions, skip=False)
        inputs = self._of(stage, load(text.inputs))
        h = h[stage :: own.order - 1]
        return from_inputs(own, h, inputs, self.length, query, self.lags, depth)

    def _of(self, stage: int, inputs: Float[Array, "B A I"]) -> Float[Array, "B A _"]:
        """A stage's among the inputs of all."""
        own = config_of(self.cfg)
        return inputs if own.head_size > 1 else inputs[..., stage :: own.order - 1]


def _own_response(
    cfg: ModelConfig, params: Params, ctx: StepContext, lags: int
) -> Float[Array, "F L"]:
    """Of a call's tokens among themselves."""
    own = config_of(cfg)
    if own.prompt == "exact" and ctx.is_prompt and "modal" in params and "skip" in params:
        params = {name: params[name] for name in ("filter", "skip")}
    return response(own, params, lags, cfg.max_positions)


def seen_by(ctx: StepContext, depth: Int[Array, "B A"], before: int) -> Seen | None:
    """What a call's tokens see in a tree, of the last `before` tokens of the text and of the fresh
    ones; None in a chain."""
    if ctx.visible is None:
        return None
    size = ctx.offset.shape[1]
    text = jnp.broadcast_to(jnp.arange(-before, 0), (len(depth), before))
    lag = depth[:, depth.shape[1] - size :, None] - jnp.concatenate([text, depth], axis=1)[:, None]
    visible = jnp.pad(ctx.visible, [(0, 0), (0, 0), (before, 0)], constant_values=True)
    return Seen(lag, visible)
