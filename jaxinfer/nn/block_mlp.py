"""A feed-forward block over the blocks of neurons that a step selected.

On a CUDA device the kernel `pallas_kernels.sparse_mlp` reads the listed blocks, on a CPU
`jaxinfer.cpu_kernels.listed_mlp` does for up to 16 rows. Without it a loop takes them one after
another, each contiguous in memory: gathering them costs more than the dense product from a quarter
of the blocks on (XLA CPU, jax 0.10.2). The loop runs on one core: bodies of several loops share
their scratch, and XLA hands work to another core only where more than eight parts are ready;
sixteen blocks a turn, written out side by side, took 0.8 of its time with 1024 x 4096 and a quarter
of the blocks, the same with a tenth. Single neurons are too small for a loop, so that only the
masked form computes them there.

Axis letters: R rows, J blocks, F neurons: J times the size of a block.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxinfer.config import Activation
from jaxinfer.cpu_kernels.listed_mlp import fits, listed_mlp
from jaxinfer.nn.activation import activate
from jaxinfer.nn.linear import input_major_product, product
from jaxinfer.nn.quantized import rounded_to_int8
from jaxinfer.runtime.backend import Backend
from jaxinfer.typing import Leaf
from pallas_kernels.sparse_mlp import sparse_mlp


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class BlockWeights:
    """A block's weights, neuron-major: the numbers of a neuron are contiguous, in `down` too.

    Codes of 8 bits have scales: `up_scale` and `gate_scale` one per neuron; of `down` either
    `hidden_scale`, one per neuron, or `down_scale`, one per output, or both.
    """

    up: Leaf  # [F, D]
    down: Leaf  # [F, D], transposed
    gate: Leaf = None  # [F, D] or None
    up_bias: Leaf = None  # [F] or None
    gate_bias: Leaf = None
    down_bias: Leaf = None  # [D] or None
    up_scale: Leaf = None  # f32[F], of codes
    gate_scale: Leaf = None
    hidden_scale: Leaf = None
    down_scale: Leaf = None  # f32[D]

    @property
    def is_int8(self) -> bool:
        return self.up_scale is not None


class Listed(NamedTuple):
    """The blocks that the rows of a step use, of L entries at most J."""

    blocks: Int[Array, " L"]  # those in use come first
    live: Int[Array, ""]  # how many are in use
    own: Bool[Array, "R L"] | None  # which of them each row selected; None for a single row


def block_mlp(
    weights: BlockWeights,
    x: Float[Array, "R D"],
    selection: Bool[Array, "R J"] | Listed,
    *,
    block_size: int,
    activation: Activation,
    backend: Backend | None = None,
) -> Float[Array, "R D"]:
    """What each row's own blocks give, in float32, whichever others share the step.

    A `Listed` selection reads the blocks in the list and no others. Of a mask all are read, and
    those that a row did not select add nothing to it.
    """
    if not isinstance(selection, Listed):
        return _masked(weights, x, selection, activation)
    if backend is not None and backend.cpu_kernels and fits(len(x), weights.up):
        return _by_cpu_kernel(weights, x, selection, block_size, activation)
    if weights.is_int8 or (backend is not None and not backend.has_kernels):
        return _looped(weights, x, selection, block_size, activation)
    w = weights
    return sparse_mlp(
        x, w.gate, w.up, w.down, selection.blocks, selection.live,
        block_size=block_size, activation=activation, row_mask=selection.own,
        up_bias=w.up_bias, gate_bias=w.gate_bias, down_bias=w.down_bias,
        implementation=None if backend is None else backend.implementation,
    )  # fmt: skip


def weighted_block_mlp(
    weights: BlockWeights,
    x: Float[Array, "R D"],
    gates: Float[Array, "R J"],
    *,
    activation: Activation,
) -> Float[Array, "R D"]:
    """`block_mlp` with every block's part multiplied by its gate, which thus has a gradient. Gates
    of 0 and 1 give what their selection gives, exactly."""
    return _masked(weights, x, gates, activation)


def hidden_values(
    weights: BlockWeights, x: Float[Array, "R D"], activation: Activation
) -> Float[Array, "R F"]:
    """What every neuron gives to `down`, in float32, selected or not."""
    return _hidden(weights, _inputs(weights, x), activation)


def gated(
    hidden: Float[Array, "R F"], gates: Bool[Array, "R J"] | Float[Array, "R J"]
) -> Float[Array, "R F"]:
    """Hidden values with every block's multiplied by its gate; 0 where a row did not select it."""
    every = jnp.repeat(gates, hidden.shape[1] // gates.shape[1], axis=1)
    return jnp.where(every, hidden, 0) if gates.dtype == bool else hidden * every


def union_list(selected: Bool[Array, "R J"]) -> Listed:
    """The blocks that any row selected, in order."""
    units = selected.shape[1]
    used = selected.any(axis=0)
    place = jnp.cumsum(used) - 1
    blocks = jnp.zeros((units,), jnp.int32)
    blocks = blocks.at[jnp.where(used, place, units)].set(jnp.arange(units), mode="drop")
    own = None if len(selected) == 1 else selected[:, blocks]
    return Listed(blocks, used.sum(dtype=jnp.int32), own)


def _looped(
    w: BlockWeights, x: Array, listed: Listed, block_size: int, activation: Activation
) -> Array:
    inputs = _inputs(w, x)

    def body(index: Array, y: Array) -> Array:
        first = listed.blocks[index] * block_size

        def of_block(leaf: Leaf) -> Leaf:
            return None if leaf is None else jax.lax.dynamic_slice_in_dim(leaf, first, block_size)

        here = BlockWeights(
            up=of_block(w.up), down=of_block(w.down), gate=of_block(w.gate),
            up_bias=of_block(w.up_bias), gate_bias=of_block(w.gate_bias),
            up_scale=of_block(w.up_scale), gate_scale=of_block(w.gate_scale),
            hidden_scale=of_block(w.hidden_scale),
        )  # fmt: skip
        hidden = _hidden(here, inputs, activation)
        if listed.own is not None:
            hidden = jnp.where(listed.own[:, index, None], hidden, 0)
        return y + _down(here, hidden)

    y = jax.lax.fori_loop(0, listed.live, body, jnp.zeros(x.shape, jnp.float32))
    return _outputs(w, y)


def _by_cpu_kernel(
    w: BlockWeights, x: Array, listed: Listed, block_size: int, activation: Activation
) -> Array:
    y = listed_mlp(
        x, w.up, w.down, listed.blocks, listed.live, block_size=block_size, activation=activation,
        gate=w.gate, own=listed.own, up_bias=w.up_bias, gate_bias=w.gate_bias,
        up_scale=w.up_scale, gate_scale=w.gate_scale, hidden_scale=w.hidden_scale,
    )  # fmt: skip
    return _outputs(w, y)


def _masked(w: BlockWeights, x: Array, gates: Array, activation: Activation) -> Array:
    return _outputs(w, _down(w, gated(hidden_values(w, x, activation), gates)))


def _inputs(w: BlockWeights, x: Array) -> tuple[Array, Array | None]:
    """The rows as they are multiplied: of the weights' dtype, or rounded to 8 bits with a scale."""
    return rounded_to_int8(x.astype(jnp.float32)) if w.is_int8 else (x.astype(w.up.dtype), None)


def _hidden(w: BlockWeights, inputs: tuple[Array, Array | None], activation: Activation) -> Array:
    """f32[R, F] of so many neurons as `w` has."""
    x, x_scale = inputs

    def project(weight: Array, bias: Leaf, scale: Leaf) -> Array:
        if x_scale is None:
            y = product(x, weight, jnp.float32)
        else:
            contract = (((1,), (1,)), ((), ()))
            y = jax.lax.dot_general(x, weight, contract, preferred_element_type=jnp.int32)
            y = y.astype(jnp.float32) * (x_scale[:, None] * scale)
        return y if bias is None else y + bias.astype(jnp.float32)

    up = project(w.up, w.up_bias, w.up_scale)
    if w.gate is None:
        return activate(activation, up)
    return activate(activation, project(w.gate, w.gate_bias, w.gate_scale)) * up


def _down(w: BlockWeights, hidden: Array) -> Array:
    """f32[R, D], without what all neurons share."""
    if w.hidden_scale is not None:
        hidden = hidden * w.hidden_scale
    down = w.down
    hidden, down = (
        (hidden, down.astype(jnp.float32)) if w.is_int8 else (hidden.astype(down.dtype), down)
    )
    return input_major_product(hidden, down)


def _outputs(w: BlockWeights, y: Array) -> Array:
    if w.down_scale is not None:
        y = y * w.down_scale
    return y if w.down_bias is None else y + w.down_bias.astype(jnp.float32)
