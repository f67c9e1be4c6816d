"""Advances a cache through jitted steps of few shapes, so that checks compile little."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.cache.context import StepContext, chain_context
from jaxinfer.cache.policy import Cache, Policy
from jaxinfer.decode.engine import with_feature_maps
from jaxinfer.lm import LM
from jaxinfer.models import stack
from jaxinfer.runtime.backend import Backend
from jaxinfer.testing.models import CONFIGS, params_of
from jaxinfer.testing.quick import QUICK, quick_jit
from jaxinfer.typing import Leaf

CHUNK = 8  # tokens of a padded step


@functools.partial(jax.jit, static_argnums=(0, 5), compiler_options=QUICK)
def _advance(cfg, params, cache, tokens, count, is_prompt):
    ctx = chain_context(cache.length, count, tokens.shape[1], is_prompt=is_prompt)
    out = stack.forward(cfg, params, tokens, cache, ctx)
    cache = stack.commit(
        cfg, params, cache, out.fresh, None, count, out.hidden, is_prompt=is_prompt
    )
    return cache, out.logits


@quick_jit
def read(cfg, params, cache, tokens, ctx):
    """Logits and fresh items of one forward."""
    out = stack.forward(cfg, params, tokens, cache, ctx)
    return out.logits, out.fresh


@quick_jit
def commit(cfg, params, cache, fresh, accepted, count, after):
    return stack.commit(cfg, params, cache, fresh, accepted, count, after)


@quick_jit
def _plain(cfg, params, tokens):
    return stack.forward(cfg, params, tokens).logits


_empty: dict[tuple, Cache] = {}


class Stepper:
    """One model and policy, advanced by hand.

    Args:
        model: a name of `jaxinfer.testing.CONFIGS`, or any model.
        policy: with its learned parameters, if it has any.
        dtype: of the cache, and of the parameters of a model given by name.
        platform: whose layout the cache has, "cpu" or "gpu"; a CPU computes with either.
    """

    def __init__(
        self, model: str | LM, policy: Policy, dtype: str = "float32", platform: str = "cpu"
    ):
        named = isinstance(model, str)
        self.cfg = CONFIGS[model] if named else model.config
        params = params_of(model, dtype) if named else model.params
        self.dtype, self.backend, self.policy = dtype, Backend.of(platform=platform), policy
        self.params = with_feature_maps(params, policy)

    def cache(self, batch: int = 1, capacity: int = 64) -> Cache:
        """An empty cache; nothing here donates it, so that equal ones are made once."""
        kind = jax.tree.structure(self.params)  # layers may keep more than the policy says
        key = (self.cfg, self.policy, kind, batch, capacity, self.dtype, self.backend)
        if key not in _empty:
            _empty[key] = stack.init_cache(
                self.cfg, self.params, self.policy, batch, capacity, self.dtype, self.backend
            )
        return _empty[key]

    def step(
        self, cache: Cache, tokens: Leaf, count: Leaf = None, size: int = CHUNK, *,
        is_prompt: bool = False,
    ) -> tuple[Cache, np.ndarray]:  # fmt: skip
        """The cache after `tokens[b, :count[b]]`, padded to `size`, and the logits of all."""
        tokens = np.asarray(tokens)
        count = np.full(len(tokens), tokens.shape[1]) if count is None else np.asarray(count)
        padded = np.full((len(tokens), size), 1, np.int32)
        padded[:, : tokens.shape[1]] = tokens
        cache, logits = _advance(
            self.cfg, self.params, cache, jnp.asarray(padded), jnp.asarray(count, jnp.int32),
            is_prompt,
        )  # fmt: skip
        return cache, np.asarray(logits)[:, : tokens.shape[1]]

    def run(
        self, cache: Cache, tokens: np.ndarray, sizes: Sequence[int], width: int = CHUNK, *,
        is_prompt: bool = False,
    ) -> tuple[Cache, np.ndarray]:  # fmt: skip
        """The cache after `tokens` in pieces of `sizes`, and the logits [B, T, V]."""
        logits, first = [], 0
        assert sum(sizes) == tokens.shape[1]
        for size in sizes:
            piece = tokens[:, first : first + size]
            cache, found = self.step(cache, piece, size=width, is_prompt=is_prompt)
            logits.append(found)
            first += size
        return cache, np.concatenate(logits, axis=1)

    def plain(self, tokens: Leaf) -> np.ndarray:
        """The logits of the forward pass without a cache."""
        return np.asarray(_plain(self.cfg, self.params, jnp.asarray(tokens)))

    def read(self, cache: Cache, tokens: Leaf, ctx: StepContext) -> tuple[jax.Array, Leaf]:
        """Logits and fresh items of tokens that are not committed."""
        return read(self.cfg, self.params, cache, jnp.asarray(tokens), ctx)

    def commit(self, cache: Cache, fresh: Leaf, accepted: Leaf, count: Leaf, after: Leaf) -> Cache:
        """The cache after the accepted ones of them."""
        return commit(self.cfg, self.params, cache, fresh, accepted, count, after)
