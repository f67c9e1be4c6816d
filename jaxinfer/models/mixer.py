"""The token mixer of a layer: attention here; recurrent mixers implement the same protocol.

`read` never writes. It returns the mixed activations and what this call adds ("fresh"), and
`commit` later brings the accepted part of it into the layer's state.
"""

from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinfer.cache.attend import Rotations, attend, commit_layer
from jaxinfer.cache.base import Geometry, Items
from jaxinfer.cache.context import CommitContext, StepContext
from jaxinfer.cache.policy import Policy
from jaxinfer.config import ModelConfig
from jaxinfer.nn.linear import linear, linears
from jaxinfer.nn.norm import norm
from jaxinfer.ops.attention import AttentionSpec
from jaxinfer.runtime.backend import Backend
from jaxinfer.typing import Leaf, Params


@runtime_checkable
class Mixer(Protocol):
    """What the stack needs of a layer's token mixer; parameters and state are of one layer."""

    def init(self, cfg: ModelConfig, policy: Policy, geometry: Geometry, batch: int) -> Leaf: ...

    def read(
        self,
        cfg: ModelConfig,
        policy: Policy,
        params: Params,
        state: Leaf,
        x: Array,
        ctx: StepContext,
        phases: Rotations,
        layer: int,
    ) -> tuple[Array, Leaf]: ...

    def commit(
        self,
        cfg: ModelConfig,
        policy: Policy,
        params: Params,
        state: Leaf,
        fresh: Leaf,
        ctx: CommitContext,
    ) -> Leaf: ...


class Attention:
    """Softmax attention over the policy's tiers and the fresh tokens."""

    def init(self, cfg: ModelConfig, policy: Policy, geometry: Geometry, batch: int):
        return tuple(tier.init(geometry, batch) for tier in policy.tiers)

    def read(self, cfg, policy, params, state, x: Float[Array, "B T D"], ctx, phases, layer):
        batch, size, _ = x.shape
        q, k, v = project(cfg, params, x, ctx.backend)
        spec = attention_spec(cfg, layer)
        sink = params.get("sink")
        y, fresh = attend(policy, spec, state, params.get("cache"), q, k, v, ctx, phases, sink)
        y = y.transpose(0, 2, 1, 3).reshape(batch, size, cfg.num_heads * cfg.head_dim)
        return linear(params["out"], y, ctx.backend), fresh

    def commit(self, cfg, policy, params, state, fresh: Items, ctx: CommitContext):
        return commit_layer(policy, state, params.get("cache"), fresh, ctx)


def project(
    cfg: ModelConfig,
    params: Params,
    x: Float[Array, "B T D"],
    backend: Backend | None = None,
) -> tuple[Float[Array, "B N T H"], Float[Array, "B K T H"], Float[Array, "B K T H"]]:
    """Queries, keys and values of an attention layer, not yet rotated."""
    batch, size, _ = x.shape

    def heads(name: str, y: Array, count: int) -> Array:
        if cfg.qkv_clip is not None:
            y = jnp.clip(y, -cfg.qkv_clip, cfg.qkv_clip)
        y = y.reshape(batch, size, count, cfg.head_dim)
        if f"{name}_norm" in params:
            y = norm(params[f"{name}_norm"], y, kind="rms", eps=cfg.norm_eps)
        return y.transpose(0, 2, 1, 3)

    q, k, v = linears([params[name] for name in ("q", "k", "v")], x, backend)
    return (
        heads("q", q, cfg.num_heads),
        heads("k", k, cfg.num_kv_heads),
        heads("v", v, cfg.num_kv_heads),
    )


def attention_spec(cfg: ModelConfig, layer: int) -> AttentionSpec:
    """The scores of layer `layer`."""
    scale = cfg.head_dim**-0.5 if cfg.attention_scale is None else cfg.attention_scale
    return AttentionSpec(
        scale=scale,
        softcap=cfg.attention_softcap,
        window=cfg.window(layer),
        slopes=cfg.alibi_slopes,
    )


MIXERS: dict[str, Mixer] = {"attn": Attention()}


def mixer_of(params_of_layer: Params) -> tuple[str, Mixer]:
    """The mixer of a layer: the one whose name its parameters carry."""
    for name, mixer in MIXERS.items():
        if name in params_of_layer:
            return name, mixer
    raise ValueError(f"no mixer among the layer's parameters {sorted(params_of_layer)}")
