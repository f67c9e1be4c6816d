"""The loss of DejaVu's predictors, for all layers at once.

Binary cross-entropy of every unit, in which units that are not needed weigh only as much as the
share of those that are: what is missed costs more than what is taken too much. The paper does not
give it; it is that of the authors' code for arXiv 2310.17157. Layers do not share parameters and
their losses are added, so each is trained as if it were alone.

Axis letters: L layers, R rows, D width, J units.
"""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from jaxinfer.train.loop import Loss
from jaxinfer.typing import Params

FLOORS = {"neurons": 0.005, "heads": 0.0}  # added to the weight of the units not needed


def weighted_cross_entropy(
    logits: Float[Array, "R J"], needed: Bool[Array, "R J"], floor: float
) -> Float[Array, ""]:
    """The mean of `(y (1 - w) + w) BCE(logit, y)` with w = mean(y) + floor."""
    y = needed.astype(jnp.float32)
    weight = y.mean() + floor
    return ((y * (1 - weight) + weight) * optax.sigmoid_binary_cross_entropy(logits, y)).mean()


def loss_of(modules: Mapping[str, nn.Module], units: Mapping[str, int]) -> Loss:
    """A loss for `jaxinfer.train.loop.fit`: parameters and batches have the kinds of `modules`, a
    batch of a kind `x` f16[L, R, D] and `bits` u8[L, R, ceil(J/8)] (`numpy.packbits`)."""

    def loss(params: Params, batch: Params, key: Array) -> tuple[Array, dict[str, Array]]:
        del key
        losses: dict[str, Array] = {}
        for kind, module in modules.items():
            x = batch[kind]["x"].astype(jnp.float32)
            needed = jnp.unpackbits(batch[kind]["bits"], axis=-1, count=units[kind]) > 0
            apply: Callable[..., Array] = module.apply  # type: ignore[assignment]
            logits = apply({"params": params[kind]}, x)
            each = jax.vmap(weighted_cross_entropy, in_axes=(0, 0, None))
            losses[kind] = each(logits, needed, FLOORS[kind]).sum()
        return jnp.stack(list(losses.values())).sum(), losses

    return loss
