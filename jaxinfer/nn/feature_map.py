"""LESS's learned feature maps of queries and keys whose product stands for exp(logit).

arXiv 2402.09398, section 3 (equations 1-2); per head, without biases, erf GELU, float32 or wider:

    phi(q) = | gelu(gelu(q Wq1) Wq2) |                                      queries, N heads
    u = |s| gelu(gelu(k Wk1) Wk2),   psi(k) = | u + (u W3) s' |             keys, K heads

Both are non-negative. With `s` and `s'` starting at 1e-4 psi starts near 0, so that LESS starts as
the bare policy; psi(0) is 0 exactly. Dropout acts on the first layer's pre-activations. Inputs are
the rotated queries and keys, not scaled. Extra letters: E width of the hidden layer, R rank.

This file imports flax, which is slow: import it inside functions.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinfer.typing import Params
from pallas_kernels.less_state.reference import key_features, query_features

START = 1e-4  # of both diagonal scalings


def _per_head(key: jax.Array, shape: tuple[int, ...]) -> Float[Array, "heads inputs outputs"]:
    """Glorot-uniform in the last two axes."""
    bound = (6 / (shape[-2] + shape[-1])) ** 0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


class FeatureMaps(nn.Module):
    """phi and psi of one layer; its parameters are 7 float32 arrays."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden: int
    rank: int
    dropout: float = 0.0

    @classmethod
    def of_params(cls, params: Params) -> "FeatureMaps":
        """The module whose parameters `params` are."""
        heads, width, hidden = params["query_inner"].shape
        kv_heads, rank = params["scale"].shape
        return cls(heads, kv_heads, width, hidden, rank)

    def setup(self):
        n, k, h, e, r = (
            *(self.num_heads, self.num_kv_heads, self.head_dim, self.hidden, self.rank),
        )
        start = nn.initializers.constant(START)
        self.query_inner = self.param("query_inner", _per_head, (n, h, e))
        self.query_outer = self.param("query_outer", _per_head, (n, e, r))
        self.key_inner = self.param("key_inner", _per_head, (k, h, e))
        self.key_outer = self.param("key_outer", _per_head, (k, e, r))
        self.mix = self.param("mix", _per_head, (k, r, r))
        self.scale = self.param("scale", start, (k, r))
        self.mix_scale = self.param("mix_scale", start, (k, r))
        self.drop = nn.Dropout(self.dropout)

    def __call__(
        self, q: Float[Array, "B N T H"], k: Float[Array, "B K S H"], train: bool = False
    ) -> tuple[Any, Any]:
        return self.query(q, train), self.key(k, train)

    def query(self, q: Float[Array, "B N T H"], train: bool = False) -> Float[Array, "B N T R"]:
        """phi(q); with `train` the rng "dropout" is needed."""
        return query_features(q, self.query_inner, self.query_outer, self._drop(train))

    def key(self, k: Float[Array, "B K T H"], train: bool = False) -> Float[Array, "B K T R"]:
        """psi(k)."""
        maps = self.key_inner, self.key_outer, self.mix, self.scale, self.mix_scale
        return key_features(k, *maps, self._drop(train))

    def _drop(self, train: bool) -> Callable[[Array], Array]:
        return lambda x: self.drop(x, deterministic=not train)
