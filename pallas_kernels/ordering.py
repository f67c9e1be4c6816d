"""Writes that must come after reads, told to XLA; imports no kernel language."""

import jax.numpy as jnp
from jaxtyping import Array


def write_index(index: Array, capacity: int, *after: Array | None) -> Array:
    """`index` (at most `capacity`, which means "drop"), made to depend on every array of `after`.

    XLA writes a buffer in place only if it can prove that all reads come first; a data dependency
    on something computed from the reads proves it. `after` are such things: integers that are never
    negative (sampled tokens), or floats. The value is unchanged, also when one is NaN.
    """
    for one in after:
        if one is not None:
            integer = jnp.issubdtype(one.dtype, jnp.integer)
            unknown = jnp.any(one < 0) if integer else jnp.any(one != one)
            index = jnp.minimum(index, capacity + unknown.astype(index.dtype))
    return index
