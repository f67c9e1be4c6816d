"""The gradient flow of one block, after its attention has been integrated out (arXiv 2310.00535).

Of M context tokens, `v` says what the K nodes of the MLP see in each, `z` the attention logits.
Gradient flow conserves z - |v|^2 / 2 (exp attention) or z^2 - |v|^2 (linear attention), so `v`
alone tells the rest:

- `delta`, identity activation: the saliency E[g_k x_l] is constant, dv/dt = delta * b(z). Exact.
- `mu`, nonlinear activation: dv/dt = (mu - v) * b(z), a heuristic of the paper (in the literature
  numbered 8, 9, 10 or 14). It shows how attention grows sparse, then dense again.

The attention b(z) is z ("linear"), exp(z / T) / A ("exp") or softmax(z / T) ("softmax", where the
conservation law, and with it the form in v alone, is approximate; the joint form is exact).

The softmax time of exp attention runs by sum(exp(z / T)) / A per unit of raw time. The orbits in it
are those of softmax attention, and no component reaches infinity in finite time.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array

from jaxinfer.typing import Leaf

Attention = Literal["linear", "exp", "softmax"]
Time = Literal["raw", "softmax"]
ATTENTIONS: tuple[Attention, ...] = get_args(Attention)
TIMES: tuple[Time, ...] = get_args(Time)


class State(NamedTuple):
    """What is integrated; without the joint form `z` is None."""

    v: Leaf  # [M, K]
    z: Leaf  # [M, K], K = 1 where the nodes share their attention
    clock: Leaf  # [K] or [1], the time that is not integrated over


class Drive(NamedTuple):
    """Arrays of the problem, all float64; one of `delta` and `mu` is given."""

    delta: Leaf  # [M, K]
    mu: Leaf  # [M, K]
    offset: Leaf  # [M, K or 1], what z - |v|^2 / 2 or z^2 - |v|^2 is and stays
    scale: Leaf  # A
    temperature: Leaf  # T
    limit: Leaf  # of |v|, where the integration ends


@dataclass(frozen=True)
class Field:
    """The right side of the flow.

    Args:
        attention: how logits become attention.
        joint: whether logits are integrated beside `v`, instead of taken from the conserved
            quantity.
        shared: whether the K nodes share one attention vector; else each has its own.
        time: what the flow is a derivative by.
    """

    attention: Attention
    joint: bool
    shared: bool
    time: Time

    def __call__(self, t: Array, state: State, drive: Drive) -> State:
        """The derivative of the state, which does not depend on `t`."""
        z = self.logits(state, drive)
        push = drive.delta if drive.delta is not None else drive.mu - state.v
        b = self.gain(z, drive)
        return State(b * push, self._logits(b, push, state.v, drive), self._clock(z, drive))

    def logits(self, state: State, drive: Drive) -> Array:
        """z [M, K or 1], integrated or from the conserved quantity."""
        if state.z is not None:
            return state.z
        square = self.summed(jnp.square(state.v))
        if self.attention == "linear":
            return jnp.sqrt(square + drive.offset)
        return square / (2 * drive.temperature) + drive.offset

    def gain(self, z: Array, drive: Drive) -> Array:
        """b per occurrence of a token and unit of the chosen time, [M, K or 1]."""
        if self.attention == "linear":
            return z
        if self.attention == "softmax" or self.time == "softmax":
            return jax.nn.softmax(z / drive.temperature, axis=0)
        return jnp.exp(z / drive.temperature) / drive.scale

    def summed(self, x: Array) -> Array:
        """The sum over the nodes that share their attention, [M, K or 1]."""
        return x.sum(axis=1, keepdims=True) if self.shared else x

    def _logits(self, b: Array, push: Array, v: Array, drive: Drive) -> Array | None:
        if not self.joint:
            return None
        s = self.summed(push * v)
        if self.attention == "linear":
            return s
        mean = (b * s).sum(axis=0) if self.attention == "softmax" else 0.0
        return b * (s - mean) / drive.temperature

    def _clock(self, z: Array, drive: Drive) -> Array:
        if self.attention != "exp":
            return jnp.ones(z.shape[1])
        rate = jax.nn.logsumexp(z / drive.temperature, axis=0) - jnp.log(drive.scale)
        return jnp.exp(-rate if self.time == "softmax" else rate)
