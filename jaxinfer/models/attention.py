"""Softmax attention as a layer's mixer: projections around what its policy stores."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinfer.cache.attend import Rotations, attend, commit_layer, rotations
from jaxinfer.cache.base import Geometry, Items
from jaxinfer.cache.context import CommitContext, StepContext
from jaxinfer.cache.policy import Policy
from jaxinfer.config import ModelConfig
from jaxinfer.models.mixer import Mixer
from jaxinfer.models.shapes import abstract_linear, abstract_norm
from jaxinfer.nn.linear import linear, linears
from jaxinfer.nn.norm import norm
from jaxinfer.ops.attention import AttentionSpec
from jaxinfer.runtime.backend import Backend
from jaxinfer.typing import Leaf, Params


class Attention(Mixer):
    """Softmax attention over the policy's tiers and the fresh tokens."""

    def abstract_params(self, cfg: ModelConfig, dtype) -> Params:
        d, h = cfg.hidden_size, cfg.head_dim
        params: Params = {
            "q": abstract_linear(d, cfg.num_heads * h, cfg.qkv_bias, dtype),
            "k": abstract_linear(d, cfg.num_kv_heads * h, cfg.qkv_bias, dtype),
            "v": abstract_linear(d, cfg.num_kv_heads * h, cfg.qkv_bias, dtype),
            "out": abstract_linear(cfg.num_heads * h, d, cfg.out_bias, dtype),
        }
        if cfg.qk_norm:
            params |= {name: abstract_norm(h, False, dtype) for name in ("q_norm", "k_norm")}
        if cfg.sink_logits:
            params["sink"] = jax.ShapeDtypeStruct((cfg.num_heads,), dtype)
        return params

    def check(self, cfg: ModelConfig, policy: Policy, geometry: Geometry) -> None:
        policy.check(cfg, geometry)

    def init(self, cfg: ModelConfig, policy: Policy, geometry: Geometry, batch: int) -> Leaf:
        return tuple(tier.init(geometry, batch) for tier in policy.tiers)

    def prepare(self, cfg: ModelConfig, policy: Policy, ctx: StepContext) -> Rotations:
        return rotations(policy, cfg.rope, ctx)

    def read(self, cfg, policy, params, state, x: Float[Array, "B T D"], ctx, prepared, layer):
        batch, size, _ = x.shape
        q, k, v = project(cfg, params, x, ctx.backend)
        spec = attention_spec(cfg, layer)
        aux, sink = params.get("cache"), params.get("sink")
        y, fresh = attend(policy, spec, state, aux, q, k, v, ctx, prepared, sink)
        y = y.transpose(0, 2, 1, 3).reshape(batch, size, cfg.num_heads * cfg.head_dim)
        return linear(params["out"], y, ctx.backend), fresh

    def commit(self, cfg, policy, params, state, fresh: Items, ctx: CommitContext):
        return commit_layer(policy, state, params.get("cache"), fresh, ctx)

    def budgeted(self, policy: Policy, state: Leaf, contexts: Sequence[int]) -> Leaf:
        pairs = zip(policy.tiers, state, strict=True)
        return tuple(tier.budgeted(tier_state, contexts) for tier, tier_state in pairs)

    def grow(self, policy: Policy, state: Leaf, capacity: int) -> Leaf:
        pairs = zip(policy.tiers, state, strict=True)
        return tuple(tier.grow(tier_state, capacity) for tier, tier_state in pairs)

    def bytes_per_row(self, cfg: ModelConfig, policy: Policy, geometry: Geometry) -> int:
        return sum(tier.bytes_per_row(geometry) for tier in policy.tiers)

    def signature(self, params: Params) -> list[Leaf]:
        return [params[name]["weight"] for name in "qkv"]


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
