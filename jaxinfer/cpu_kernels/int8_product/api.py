"""Products of a few rows with weights of 8 bits that have one scale per output.

A decode step reads every weight once and is bound by the memory's rate, of which XLA CPU reaches a
part with integers. Here the rows are rounded to 8 bits once for all weights that multiply them, a
weight is read once for up to 4 rows and from a core's cache for more, and threads of XLA's pool
share the outputs. Axis letters: R rows, I inputs, O outputs.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from jaxinfer.cpu_kernels.loading import require

MOST_ROWS, MOST_INPUTS = 16, 65536  # of `common/kernels.h`

Codes = tuple[Int8[Array, "_ I"], Float[Array, " _"]]


def fits(rows: int, inputs: int) -> bool:
    """Whether the kernel takes so many rows and inputs."""
    return 0 < rows <= MOST_ROWS and 0 < inputs <= MOST_INPUTS


def int8_products(
    x: Float[Array, "R I"], weights: Sequence[Codes]
) -> tuple[Float[Array, "R _"], ...]:
    """`x`, rounded to 8 bits by row, times `codes * scale` of each weight, in float32.

    Equal to what `jaxinfer.nn.quantized` does with XLA to the last bit: sums are exact, and what
    follows them is one product of scales and one with the sum. There is no gradient.

    Args:
      x: floating; R and I as `fits` says.
      weights: codes int8[O, I] and scales float32[O] of each.

    Raises:
      ValueError: the kernels are not in use, with the reason.
    """
    require()
    out = [jax.ShapeDtypeStruct((len(x), len(codes)), jnp.float32) for codes, _ in weights]
    call = jax.ffi.ffi_call("jaxinfer_int8_product", out, vmap_method="sequential")
    operands = [part for weight in weights for part in weight]
    return tuple(call(x.astype(jnp.float32), *operands))
