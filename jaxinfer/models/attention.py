"""Softmax attention as a layer's mixer: projections around what its policy stores."""

from collections.abc import Sequence

import jax
from jaxtyping import Array, Float

from jaxinfer.cache.attend import Rotations, attend, commit_layer, rotations
from jaxinfer.cache.base import Geometry, Items
from jaxinfer.cache.context import CommitContext, StepContext
from jaxinfer.cache.policy import Policy
from jaxinfer.config import ModelConfig
from jaxinfer.models.deferred import Deferred, KeysOf, reading, uncommitted
from jaxinfer.models.mixer import Mixer
from jaxinfer.models.projections import output, project
from jaxinfer.models.shapes import abstract_linear, abstract_norm
from jaxinfer.nn.divided import own_part
from jaxinfer.nn.heads import chosen
from jaxinfer.ops.attention import AttentionSpec
from jaxinfer.runtime.backend import Backend
from jaxinfer.runtime.memory import attention_floats
from jaxinfer.typing import Leaf, Params


class Attention(Mixer):
    """Softmax attention over the policy's tiers and the fresh tokens."""

    truncates = True
    divides = True
    reads_norm = ("q", "k", "v")

    def abstract_params(self, cfg: ModelConfig, layer: int, dtype) -> Params:
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

    def policy(self, cfg: ModelConfig, params: Params, policy: Policy) -> Policy:
        heads = params.get("heads")
        if heads is None or heads.keys == "always":
            return policy
        return Deferred.of(cfg, policy)

    def check(self, cfg: ModelConfig, policy: Policy, geometry: Geometry) -> None:
        policy.check(cfg, geometry)

    def init(self, cfg: ModelConfig, policy: Policy, geometry: Geometry, batch: int) -> Leaf:
        return tuple(tier.init(geometry, batch) for tier in policy.tiers)

    def prepare(self, cfg: ModelConfig, policy: Policy, ctx: StepContext) -> Rotations:
        return rotations(policy, cfg.rope, ctx)

    def read(self, cfg, policy, params, state, x: Float[Array, "B T D"], ctx, prepared, layer):
        heads = chosen(params, x, ctx.sites, ctx.backend, ctx.is_prompt)
        listing = None if heads is None else heads.listing
        aux, sink, deferred = params.get("cache"), params.get("sink"), isinstance(policy, Deferred)
        here = ctx
        if deferred:
            (q,) = project(cfg, params, x, ctx.backend, names="q", listing=listing)
            keys = KeysOf.of(cfg, policy, params, ctx.backend)
            k, v, tail, here = reading(keys, state, x, ctx, listing)
            aux = (aux or {}) | tail
        elif listing is not None:
            (q,) = project(cfg, params, x, ctx.backend, names="q", listing=listing)
            k, v = project(cfg, params, x, ctx.backend, names="kv")
        else:
            q, k, v = project(cfg, params, x, ctx.backend)
        spec = attention_spec(cfg, layer, ctx.backend)
        selected = None if heads is None else heads.selected
        y, fresh = attend(policy, spec, state, aux, q, k, v, here, prepared, sink, selected)
        if deferred:
            fresh = uncommitted(x, fresh, ctx)
        return output(params, y, ctx.backend, heads), fresh

    def commit(self, cfg, policy, params, state, fresh: Items, ctx: CommitContext):
        aux = params.get("cache")
        if isinstance(policy, Deferred):
            keys = KeysOf.of(cfg, policy, params, state[0].backend)
            aux = (aux or {}) | {"keys": keys}
        return commit_layer(policy, state, aux, fresh, ctx)

    def budgeted(self, policy: Policy, state: Leaf, contexts: Sequence[int]) -> Leaf:
        pairs = zip(policy.tiers, state, strict=True)
        return tuple(tier.budgeted(tier_state, contexts) for tier, tier_state in pairs)

    def grow(self, policy: Policy, state: Leaf, capacity: int) -> Leaf:
        pairs = zip(policy.tiers, state, strict=True)
        return tuple(tier.grow(tier_state, capacity) for tier, tier_state in pairs)

    def bytes_per_row(self, cfg: ModelConfig, policy: Policy, geometry: Geometry) -> int:
        return sum(tier.bytes_per_row(geometry) for tier in policy.tiers)

    def floats_per_token(self, cfg: ModelConfig, keys: int) -> int:
        return attention_floats(cfg, keys)

    def signature(self, params: Params) -> list[Leaf]:
        return [params[name]["weight"] for name in "qkv"]


def attention_spec(cfg: ModelConfig, layer: int, backend: Backend | None = None) -> AttentionSpec:
    """The scores of layer `layer`; of the heads that this device has."""
    scale = cfg.head_dim**-0.5 if cfg.attention_scale is None else cfg.attention_scale
    return AttentionSpec(
        scale=scale,
        softcap=cfg.attention_softcap,
        window=cfg.window(layer),
        slopes=own_part(cfg.alibi_slopes, backend),
    )
