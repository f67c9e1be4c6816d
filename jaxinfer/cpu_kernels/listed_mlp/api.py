"""The feed-forward block of contextual sparsity (DejaVu, arXiv 2310.17157, section 4.3).

Only the weights of listed blocks of neurons are read, and rows of `down` only for neurons that give
something to a row: with ReLU many do not. Threads of XLA's pool share first the neurons, then the
columns of the result, so that no sum is split between them. Axis letters: R rows, D model width,
F neurons, L entries of the list.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxinfer.cpu_kernels.loading import require

MOST_ROWS, MOST_INPUTS = 16, 65536  # of `common/kernels.h`
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")  # in the order of `common/kernels.h`
WEIGHTS = (jnp.float32, jnp.int8)


def fits(rows: int, up: Shaped[Array, "F D"]) -> bool:
    """Whether the kernel takes so many rows and such weights."""
    few, narrow = 0 < rows <= MOST_ROWS, 0 < up.shape[1] <= MOST_INPUTS
    return few and narrow and up.dtype in WEIGHTS


def listed_mlp(
    x: Float[Array, "R D"],
    up: Shaped[Array, "F D"],
    down: Shaped[Array, "F D"],
    blocks: Int[Array, " L"],
    live: Int[Array, ""],
    *,
    block_size: int,
    activation: str,
    gate: Shaped[Array, "F D"] | None = None,
    own: Bool[Array, "R L"] | None = None,
    up_bias: Float[Array, " F"] | None = None,
    gate_bias: Float[Array, " F"] | None = None,
    up_scale: Float[Array, " F"] | None = None,
    gate_scale: Float[Array, " F"] | None = None,
    hidden_scale: Float[Array, " F"] | None = None,
) -> Float[Array, "R D"]:
    """`down(act(gate(x)) * up(x))`, or `down(act(up(x)))` without a gate, over the listed neurons.

    All arithmetic is float32; with codes of 8 bits `x` is rounded to 8 bits by row first, hidden
    values are not. There is no gradient. A block outside the weights is an error when it runs.

    Args:
      x: floating; R and D as `fits` says.
      up, gate, down: float32 or int8, neuron-major: `down` is transposed.
      blocks: block j holds the neurons from `j * block_size` on; entries are distinct, those from
        `live` on are not looked at.
      live: how many of them are in use.
      block_size: neurons of a block; divides F.
      activation: one of `ACTIVATIONS`.
      own: which listed blocks each row selected; the others add nothing to it. None: all.
      up_bias, gate_bias: of neurons.
      up_scale, gate_scale: of the codes of 8 bits.
      hidden_scale: a factor of what each neuron gives to `down`.

    Raises:
      ValueError: the kernels are not in use, with the reason, or the activation is none of them.
    """
    require()
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    numbers = (up_bias, gate_bias, up_scale, gate_scale, hidden_scale)
    optional = (gate, own, *(None if n is None else n.astype(jnp.float32) for n in numbers))
    call = jax.ffi.ffi_call(
        "jaxinfer_listed_mlp",
        jax.ShapeDtypeStruct(x.shape, jnp.float32),
        vmap_method="sequential",
    )
    return call(
        x.astype(jnp.float32), up, down, blocks.astype(jnp.int32), live.astype(jnp.int32),
        *(operand for operand in optional if operand is not None),
        block_size=np.int64(block_size),
        activation=np.int64(ACTIVATIONS.index(activation)),
        present=np.int64(sum(1 << i for i, one in enumerate(optional) if one is not None)),
    )  # fmt: skip
