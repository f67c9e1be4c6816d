"""LESS: evicted tokens live on in a low-rank state of constant size (arXiv 2402.09398, section 3).

The last tier of a policy absorbs what the others evict: with feature maps phi (queries) and psi
(keys), `num += psi(k)^T v` and `den += psi(k)^T` (equations 4-5 there). A query sees the state as
one more partial softmax, `phi(q) num` over `phi(q) den`, merged with the tokens that are kept
(equation 3); with feature maps of zero it is the identity of the merge, bit for bit. Everything is
float32 (float64 of a float64 cache): the state sums over thousands of tokens. Bytes per row and
layer: `4 * K * R * (H + 1)`.

The maps see keys and queries as attention does, rotated; they are `FeatureMaps` of
`jaxinfer.nn.feature_map`, learned by `jaxinfer.train.less.training`.
"""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxinfer.cache.base import Geometry, Items, QueryPhase, Tier, write_index
from jaxinfer.cache.context import PushContext
from jaxinfer.config import ModelConfig
from jaxinfer.ops.attention import AttentionSpec, Partial
from jaxinfer.ops.stored import attend_low_rank
from jaxinfer.ops.stored_writes import absorb
from jaxinfer.runtime.backend import Backend
from jaxinfer.typing import Leaf, Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LowRankState:
    num: Leaf  # f32[B, K, R, H], sum of psi(k)^T v over the tokens that are gone
    den: Leaf  # f32[B, K, R], sum of psi(k)
    backend: Backend = field(default=Backend(), metadata={"static": True})


@dataclass(frozen=True, kw_only=True)
class FeatureSegment:
    """The tokens that are gone, as a query sees them through `phi`."""

    state: LowRankState
    aux: Params
    rank: int
    query_phase: QueryPhase = "absolute"
    holds_tokens: bool = False
    ends_softmax: bool = False
    capacity: int = 0
    pos: None = None

    def partial(self, spec: AttentionSpec, q: Array, q_pos: Array, mask_fn) -> Partial:
        state = self.state
        return attend_low_rank(q, state.num, state.den, self.aux, backend=state.backend)

    def output(self, spec, q, mask_fn, extra):
        raise TypeError("a low-rank state does not end a softmax")

    def key_weights(self, spec, q, q_pos, mask_fn, lse):
        raise TypeError("a low-rank state has no keys that could receive attention weight")


@dataclass(frozen=True, kw_only=True)
class LowRank(Tier):
    """Absorbs every token that enters; `rank` is that of the feature maps in `aux`."""

    rank: int

    def check(self, cfg: ModelConfig, geometry: Geometry) -> None:
        if cfg.alibi_slopes is not None or cfg.sliding_windows is not None:
            raise ValueError(
                f"LESS cannot serve {cfg.family}: ALiBi and sliding windows need the distance to a "
                "token, which the low-rank state forgets; use the eviction policy without LESS"
            )

    def init(self, geometry: Geometry, batch: int) -> LowRankState:
        shape, dtype = (batch, geometry.num_kv_heads, self.rank), _dtype(geometry)
        return LowRankState(
            num=jnp.zeros((*shape, geometry.head_dim), dtype),
            den=jnp.zeros(shape, dtype),
            backend=_backend(geometry),
        )

    def segments(self, state: LowRankState, aux: Params | None, n_in: Array):
        return (FeatureSegment(state=state, aux=_feature_map(aux), rank=self.rank),)

    def push(self, state: LowRankState, aux, items: Items, ctx: PushContext):
        num, den = absorb(
            state.num, state.den, items.k, items.v,
            write_index(ctx.count, items.v.shape[2], ctx.after),  # the kernel writes in place
            _feature_map(aux), backend=state.backend,
        )  # fmt: skip
        return replace(state, num=num, den=den), None, jnp.zeros_like(ctx.count)

    def bytes_per_row(self, geometry: Geometry) -> int:
        numbers = geometry.num_kv_heads * self.rank * (geometry.head_dim + 1)
        return numbers * _dtype(geometry).itemsize


def _dtype(geometry: Geometry) -> jnp.dtype:
    return jnp.result_type(jnp.dtype(geometry.dtype), jnp.float32)


def _backend(geometry: Geometry) -> Backend:
    """XLA where the state is no float32, which is what its GPU kernels know."""
    backend = geometry.backend
    if _dtype(geometry) == jnp.float32:
        return backend
    if backend.implementation in ("triton", "interpret"):
        raise ValueError(
            f"LESS's GPU kernels keep its state in float32, got a cache of {geometry.dtype}, "
            "whose state is wider; without `implementation` XLA reads and updates it"
        )
    return replace(backend, implementation="reference")


def _feature_map(aux: Params | None) -> Params:
    if aux is None or "feature_map" not in aux:
        raise ValueError(
            "a LESS policy needs its feature maps: use ji.less(base_policy, feature_maps)"
        )
    return aux["feature_map"]
