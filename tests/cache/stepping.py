"""Advances a cache through jitted steps of few shapes, so that the cache tests compile little."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.cache.context import StepContext, chain_context
from jaxinfer.cache.policy import Cache, Policy
from jaxinfer.decode.engine import with_feature_maps
from jaxinfer.models import stack
from jaxinfer.runtime.backend import Backend
from tests.factories import CONFIGS, params_of
from tests.policies import with_random_feature_maps
from tests.quick import quick_jit

CHUNK = 8  # tokens of a padded step


@quick_jit
def _advance(cfg, params, cache, tokens, count):
    ctx = chain_context(cache.length, count, tokens.shape[1])
    out = stack.forward(cfg, params, tokens, cache, ctx)
    return stack.commit(cfg, params, cache, out.fresh, None, count, out.hidden), out.logits


@quick_jit
def read(cfg, params, cache, tokens, ctx):
    """Logits and fresh items of one forward."""
    out = stack.forward(cfg, params, tokens, cache, ctx)
    return out.logits, out.fresh


@quick_jit
def commit(cfg, params, cache, fresh, take, count, after):
    return stack.commit(cfg, params, cache, fresh, take, count, after)


@quick_jit
def _plain(cfg, params, tokens):
    return stack.forward(cfg, params, tokens).logits


_empty: dict[tuple, Cache] = {}


class Stepper:
    """One model and policy; `dtype` is that of parameters and cache."""

    def __init__(self, model: str, policy: Policy, dtype: str = "float32", backend: str = "cpu"):
        self.cfg, self.dtype, self.backend = CONFIGS[model], dtype, Backend.of(platform=backend)
        self.policy = with_random_feature_maps(policy, self.cfg)
        self.params = with_feature_maps(params_of(model, dtype), self.policy)

    def cache(self, batch: int = 1, capacity: int = 64) -> Cache:
        """An empty cache; nothing here donates it, so that equal ones are made once."""
        key = (self.cfg, self.policy, batch, capacity, self.dtype, self.backend)
        if key not in _empty:
            _empty[key] = stack.init_cache(
                self.cfg, self.params, self.policy, batch, capacity, self.dtype, self.backend
            )
        return _empty[key]

    def step(self, cache: Cache, tokens, count=None, size: int = CHUNK):
        """The cache after `tokens[b, :count[b]]`, padded to `size`, and the logits of all."""
        tokens = np.asarray(tokens)
        count = np.full(len(tokens), tokens.shape[1]) if count is None else np.asarray(count)
        padded = np.full((len(tokens), size), 1, np.int32)
        padded[:, : tokens.shape[1]] = tokens
        cache, logits = _advance(
            self.cfg, self.params, cache, jnp.asarray(padded), jnp.asarray(count, jnp.int32)
        )
        return cache, np.asarray(logits)[:, : tokens.shape[1]]

    def run(self, cache: Cache, tokens, sizes, width: int = CHUNK):
        """The cache after `tokens` in pieces of `sizes`, and the logits [B, T, V]."""
        logits, first = [], 0
        assert sum(sizes) == tokens.shape[1]
        for size in sizes:
            cache, found = self.step(cache, tokens[:, first : first + size], size=width)
            logits.append(found)
            first += size
        return cache, np.concatenate(logits, axis=1)

    def plain(self, tokens) -> np.ndarray:
        """The logits of the forward pass without a cache."""
        return np.asarray(_plain(self.cfg, self.params, jnp.asarray(tokens)))

    def read(self, cache, tokens, ctx: StepContext):
        return read(self.cfg, self.params, cache, jnp.asarray(tokens), ctx)

    def commit(self, cache, fresh, take, count, after):
        return commit(self.cfg, self.params, cache, fresh, take, count, after)


def row_of(tree, row: int):
    """Row `row` of every leaf, as numpy."""
    return jax.tree.map(lambda x: np.asarray(x)[row], tree)


def assert_same(a, b) -> None:
    """Equal in every bit (NaN equals NaN)."""
    jax.tree.map(np.testing.assert_array_equal, a, b)


def close(dtype: str = "float32") -> dict[str, float]:
    """Tolerance for logits of size about 10: sums in another order, through two layers."""
    return {"rtol": 0, "atol": 2e-4 if dtype == "float32" else 0.3}
