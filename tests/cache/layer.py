"""One attention layer's cache without a model: random queries, keys and values, token by token."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.cache.attend import attend, commit_layer, rotations
from jaxinfer.cache.base import Geometry
from jaxinfer.cache.context import chain_context
from jaxinfer.cache.policy import Policy
from jaxinfer.config import RopeConfig
from jaxinfer.ops.attention import AttentionSpec
from jaxinfer.testing.quick import quick_jit
from tests.cache.pushing import committing
from tests.compilation import AS_USERS_DO

K, G, H = 2, 2, 8
SPEC = AttentionSpec(scale=H**-0.5)
ROPE = RopeConfig(rotary_dim=H, theta=10000.0)


def _step(policy: Policy, spec: AttentionSpec, rope, state, aux, q, k, v, length, count):
    """Output [B, N, T, H] of fresh tokens and the state after the first `count` of them."""
    ctx = chain_context(length, count, q.shape[2])
    phases = rotations(policy, rope, ctx)
    out, fresh = attend(policy, spec, state, aux, q, k, v, ctx, phases)
    return out, commit_layer(policy, state, aux, fresh, committing(length, count, out))


STEPS = {
    "quick": functools.partial(quick_jit, static_argnums=(0, 1, 2))(_step),
    # For what is compared bit by bit, and for what must survive the compiler's liberties.
    "as users do": jax.jit(_step, static_argnums=(0, 1, 2), compiler_options=AS_USERS_DO),
}


class Layer:
    """A cache of one layer for `batch` rows, `length` tokens of which count as read already;
    `compiled` names one of `STEPS`."""

    def __init__(
        self, policy, spec=SPEC, rope=ROPE, aux=None, batch=1, capacity=256, length=0,
        compiled="quick",
    ):  # fmt: skip
        self.policy, self.spec, self.rope, self.aux = policy, spec, rope, aux
        self.step = STEPS[compiled]
        geometry = Geometry(num_kv_heads=K, head_dim=H, capacity=capacity)
        self.state = tuple(tier.init(geometry, batch) for tier in policy.tiers)
        self.length = np.full((batch,), length, np.int32)

    def push(self, q, k, v, count=None) -> np.ndarray:
        """Attention output of the tokens, which are then committed."""
        count = np.full(len(q), q.shape[2]) if count is None else np.asarray(count)
        out, self.state = self.step(
            self.policy, self.spec, self.rope, self.state, self.aux,
            *(jnp.asarray(x, jnp.float32) for x in (q, k, v)),
            jnp.asarray(self.length), jnp.asarray(count, jnp.int32),
        )  # fmt: skip
        self.length = self.length + count.astype(np.int32)
        return np.asarray(out)

    def stream(self, q, k, v) -> np.ndarray:
        """The same, one token at a time."""
        steps = range(q.shape[2])
        return np.concatenate(
            [self.push(*(x[:, :, i : i + 1] for x in (q, k, v))) for i in steps], axis=2
        )


def random_qkv(tokens: int, batch: int = 1, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Queries [B, N, T, H], keys and values [B, K, T, H] in float64."""
    rng = np.random.default_rng(seed)
    heads = (K * G, K, K)
    q, k, v = (rng.normal(size=(batch, n, tokens, H)) for n in heads)
    return 2 * q, k, v


def rotated(x: np.ndarray, position: int, rope: RopeConfig = ROPE) -> np.ndarray:
    """`x` [..., H] at `position`, in float64."""
    half = rope.rotary_dim // 2
    angle = position * rope.theta ** -(np.arange(half) / half)
    first, second, rest = np.split(x, [half, 2 * half], axis=-1)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def softmax_attention(q, keys, values, bias=0.0) -> np.ndarray:
    """One query [H] over keys and values [J, H], in float64."""
    scores = keys @ q * SPEC.scale + bias
    p = np.exp(scores - scores.max())
    return p @ values / p.sum()


__all__ = ["G", "H", "K", "ROPE", "SPEC", "Layer", "random_qkv", "replace", "rotated"]
