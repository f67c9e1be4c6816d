"""Implicit filters: a small network of the position, under a window that decays (Hyena, arXiv
2302.10866, section 3.3).

The features of position t of L are `[tau, cos(f_b w_t), -sin(f_b w_t)]` with tau = t / (L - 1),
w_t = 2 pi t / L and frequencies f from 1e-4 to bands - 1. Linear layers with sines between them,
`sin(frequency * x)` with one trained vector of frequencies for all of them, make F numbers of it,
and the window multiplies those of filter c by `exp(-tau |delta_c|) + shift`. So neither the number
of parameters nor the reach depends on the other.

A table of features that was trained is a parameter: load it, never make it again.

This file imports flax, which is slow: import it inside functions. Axis letters: F filters, L
positions, E features, W width, I inner layers.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxinfer.hyena_config import FilterConfig


class ImplicitFilter(nn.Module):
    """F filters of `length` lags; its parameters are float32 arrays."""

    filters: int
    length: int
    config: FilterConfig

    def setup(self):
        own = self.config
        first, inner, last = (own.width, own.features), (own.width, own.width), self.filters
        draw, zeros = _uniform, nn.initializers.zeros
        if own.init == "normal":
            draw = nn.initializers.normal(0.02)
        draw_bias = zeros if own.init == "normal" else _uniform_of(own.width)
        self.first = self.param("first", draw, first)
        first_bias = zeros if own.init == "normal" else _uniform_of(own.features)
        self.first_bias = self.param("first_bias", first_bias, (own.width,))
        self.inner = self.param("inner", draw, (own.inner_layers, *inner))
        self.inner_bias = self.param("inner_bias", draw_bias, (own.inner_layers, own.width))
        final = draw if own.init != "xavier" else nn.initializers.xavier_normal(1, 0)
        self.last = self.param("last", final, (last, own.width))
        sine = nn.initializers.constant(own.frequency)
        self.frequency = self.param("frequency", sine, (own.width,))
        if own.trained_positions:
            self.positions = self.param("positions", self._table)
        else:
            self.positions = self._table(None)

    def __call__(self, count: int) -> Float[Array, "F T"]:
        """Lags 0 to `count` - 1."""
        x = self.positions[:count] @ self.first.T + self.first_bias
        for weight, bias in zip(self.inner, self.inner_bias, strict=True):
            x = jnp.sin(self.frequency * x) @ weight.T + bias
        h = (jnp.sin(self.frequency * x) @ self.last.T).T
        if self.config.window:
            h = h * window(self.config, self.filters, self.length)[:, :count]
        if self.config.normalized:
            h = h / jnp.abs(h).sum(axis=0, keepdims=True)
        return h

    def _table(self, key: jax.Array | None) -> Float[Array, "L E"]:
        return jnp.asarray(features(self.length, self.config.features))


def features(length: int, count: int) -> Float[np.ndarray, "L E"]:
    """What an untrained network is told of the positions."""
    bands = (count - 1) // 2
    position = np.arange(length, dtype=np.float32)[:, None]
    tau = position / np.float32(max(length - 1, 1))
    angle = np.float32(2 * math.pi) * position / np.float32(length)
    frequencies = np.linspace(1e-4, bands - 1, bands, dtype=np.float32)
    if bands == 1:
        frequencies = np.full(1, 1e-4, np.float32)
    angles = frequencies * angle
    return np.concatenate([tau, np.cos(angles), -np.sin(angles)], axis=1)


def window(config: FilterConfig, filters: int, length: int) -> Float[np.ndarray, "F L"]:
    """The decay of each filter; the first decays slowest."""
    tau = np.arange(length, dtype=np.float32) / np.float32(max(length - 1, 1))
    slow, fast = (math.log(config.floor) / share for share in (config.slow, config.fast))
    deltas = np.abs(np.linspace(slow, fast, filters, dtype=np.float32))
    return np.exp(-tau * deltas[:, None]) + np.float32(config.shift)


def _uniform(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    """+-1 / sqrt(inputs), the last axis."""
    bound = shape[-1] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def _uniform_of(inputs: int):
    """+-1 / sqrt(`inputs`), for a bias."""

    def draw(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -(inputs**-0.5), inputs**-0.5)

    return draw
