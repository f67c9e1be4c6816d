"""Which neurons and heads a token needs: the labels that predictors learn.

After a ReLU a neuron is needed where it is not zero. Where nothing is zero (another activation),
and for blocks of neurons, what counts is how much a unit adds to the output: the activation's
magnitude times the norm of the neuron's row of `down`, for a block the norm of these; a token needs
the largest. Heads are needed by the norm of what they give before the output projection.

Axis letters: T tokens, F neurons, J units (neurons or blocks), N query heads, H head size, K groups
of query heads.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxinfer.config import ModelConfig
from jaxinfer.nn.quantized import StoredWeight
from jaxinfer.sparsity.base import Rule
from jaxinfer.sparsity.recall import by_density
from jaxinfer.typing import Params


def has_zeros(cfg: ModelConfig, block_size: int) -> bool:
    """Whether the activations themselves say which units are needed."""
    return cfg.activation == "relu" and block_size == 1


def needed_neurons(
    cfg: ModelConfig, block: Params, hidden: Float[Array, "T F"], block_size: int, share: float
) -> Bool[Array, "T J"]:
    """The units of `block_size` neurons that each token needs; of a model without zeros, and of
    blocks, the share `share` that adds most."""
    if has_zeros(cfg, block_size):
        return hidden != 0
    return largest(contributions(block, hidden, block_size), share)


def contributions(
    block: Params, hidden: Float[Array, "T F"], block_size: int = 1
) -> Float[Array, "T J"]:
    """How much each unit adds to the output of a dense feed-forward block.

    Raises:
      ValueError: the block is stored in few bits.
    """
    down = block["down"]["weight"]
    if isinstance(down, StoredWeight):
        raise ValueError("predictors learn from a model in full precision; load it without weights")
    each = hidden.astype(jnp.float32) * jnp.linalg.norm(down.astype(jnp.float32), axis=0)
    return jnp.linalg.norm(each.reshape(len(each), -1, block_size), axis=-1)


def needed_groups(heads: Float[Array, "T N H"], groups: int, share: float) -> Bool[Array, "T K"]:
    """The groups of query heads (those that share a key head) whose outputs are the largest."""
    norms = jnp.linalg.norm(heads.astype(jnp.float32).reshape(len(heads), groups, -1), axis=-1)
    return largest(norms, share)


def largest(amounts: Float[Array, "T J"], share: float) -> Bool[Array, "T J"]:
    """The largest of each row, as many as are the share `share`, and none that is zero."""
    return Rule(most=by_density(amounts.shape[1], share))(amounts) & (amounts > 0)
