"""The sparse feed-forward block in plain `jnp`: gathers the listed neurons, then multiplies."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.activation import REFERENCE


def sparse_mlp(
    x: Float[Array, "C R D"],
    gate: Float[Array, "F D"] | None,
    up: Float[Array, "F D"],
    down: Float[Array, "F D"],
    blocks: Int[Array, "C cap"],
    count: Int[Array, " C"],
    row_mask,  # bool[C, R, cap] or None
    up_bias,  # [F] or None
    gate_bias,
    *,
    block_size: int,
    activation: str,
) -> Float[Array, "C R D"]:
    """C lists of neuron blocks, each for its own R rows."""
    act = REFERENCE[activation]
    places = jnp.arange(blocks.shape[1] * block_size)

    def one(operands):
        x, blocks, count, row_mask = operands
        neurons = blocks[places // block_size] * block_size + places % block_size
        neurons = jnp.where(places < count * block_size, neurons, len(up))

        def listed(w: Shaped[Array, "F *D"]) -> Shaped[Array, "P *D"]:
            return w.at[neurons].get(mode="fill", fill_value=0)  # zeros behind `count` and F

        def project(w, bias):
            y = jnp.einsum("rd,pd->rp", x, listed(w), preferred_element_type=jnp.float32)
            return y if bias is None else y + listed(bias).astype(jnp.float32)

        h = project(up, up_bias)
        h = act(h) if gate is None else act(project(gate, gate_bias)) * h
        if row_mask is not None:
            h = jnp.where(jnp.repeat(row_mask, block_size, axis=1), h, 0)
        h = h.astype(down.dtype)
        return jnp.einsum("rp,pd->rd", h, listed(down), preferred_element_type=jnp.float32)

    # One list after another: a gathered copy of the weights for each at once might not fit.
    return jax.lax.map(one, (x, blocks, count, row_mask))
