"""The residual sum and norm in plain `jnp`."""

import jax
import jax.numpy as jnp


def add_norm(x, delta, scale, bias, *, kind, eps):
    y = x if delta is None else (x + delta).astype(x.dtype)
    wide = y.astype(jnp.float32)
    if kind == "layer":
        wide = wide - wide.mean(axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    wide = wide * scale.astype(jnp.float32)
    if bias is not None:
        wide = wide + bias.astype(jnp.float32)
    return y, wide.astype(x.dtype)
