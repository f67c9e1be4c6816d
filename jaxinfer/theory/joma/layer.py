"""One layer in the coordinates of its tokens: attention over a context, then an MLP.

Embeddings are frozen and orthonormal, so that only what the K nodes see in each of M context tokens
(`v`) and in each of Q query tokens (`query`, the residual) counts. Logits are free: one vector per
query. The hidden units are phi(b v + query), the outputs a linear map to C classes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxinfer.theory.joma.fields import Attention
from jaxinfer.typing import Leaf


class Layer(NamedTuple):
    """Parameters, float64."""

    v: Leaf  # [M, K]
    query: Leaf  # [Q, K]
    z: Leaf  # [Q, M]
    out: Leaf  # [K, C]


def attend(kind: Attention, x: Array, z: Array, temperature: Array) -> Array:
    """b [N, M]: x z, x exp(z / T) or its normalised form, of contexts `x` and logits `z` [N, M]."""
    if kind == "linear":
        return x * z
    if kind == "exp":
        return x * jnp.exp(z / temperature)
    present = x > 0
    scores = jnp.where(present, jnp.log(jnp.where(present, x, 1)) + z / temperature, -jnp.inf)
    return jax.nn.softmax(scores, axis=-1)


def outputs(layer: Layer, before: Array, slope: Array) -> Array:
    """Logits of the classes [N, C], from the values in front of the activation [N, K], which is
    max(y, slope y): the identity for slope 1, ReLU for 0."""
    return jnp.maximum(before, slope * before) @ layer.out
