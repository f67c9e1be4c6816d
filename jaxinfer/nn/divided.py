"""What the devices of a stage do together, where each has a part of the heads, widths and words.

Inside `jax.shard_map` every device multiplies by its own part of the weights; what they put out is
added, and logits are put side by side. `Backend.axis` names the devices; without it one has it all,
and nothing is done.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfer.nn.linear import rows
from jaxinfer.nn.quantized import StoredWeight
from jaxinfer.runtime.backend import Backend


def summed(x: Float[Array, "..."], backend: Backend | None) -> Float[Array, "..."]:
    """The sum of what the devices have."""
    axis = _axis(backend)
    return x if axis is None else jax.lax.psum(x, axis)


def looked_up(
    weight: Float[Array, "_ I"] | StoredWeight, tokens: Int[Array, "..."], backend: Backend | None
) -> Float[Array, "... I"]:
    """The embeddings of tokens; each device looks up those that it has."""
    axis = _axis(backend)
    if axis is None:
        return rows(weight, tokens)
    here = tokens - jax.lax.axis_index(axis) * weight.shape[0]
    has = (here >= 0) & (here < weight.shape[0])
    found = rows(weight, jnp.where(has, here, 0))
    return jax.lax.psum(jnp.where(has[..., None], found, 0), axis)


def gathered(
    logits: Float[Array, "B T _"], vocabulary: int, backend: Backend | None
) -> Float[Array, "B T _"]:
    """The logits of all devices, without those of words that fill up the last part."""
    axis = _axis(backend)
    if axis is None:
        return logits
    return jax.lax.all_gather(logits, axis, axis=2, tiled=True)[..., :vocabulary]


def own_part(
    values: tuple[float, ...] | None, backend: Backend | None
) -> tuple[float, ...] | Array | None:
    """Of constants, one per head, those of this device's heads."""
    axis = _axis(backend)
    if values is None or axis is None:
        return values
    parts = jnp.asarray(values, jnp.float32).reshape(jax.lax.axis_size(axis), -1)
    return parts[jax.lax.axis_index(axis)]


def _axis(backend: Backend | None) -> str | None:
    return None if backend is None else backend.axis
