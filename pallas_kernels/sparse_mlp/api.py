"""The gathered feed-forward block of contextual sparsity (DejaVu, arXiv 2310.17157, section 4.3).

Only the weights of the listed neuron blocks are read. The list has a static capacity and a live
count; with a capacity of all blocks nothing is ever cut off, and what lies behind the count costs
an empty program. Axis letters: B rows, D model width, F neurons, cap entries of a list, C lists,
R rows that share one.
"""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.activation import check_activation
from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.shapes import expect
from pallas_kernels.sparse_mlp import reference
from pallas_kernels.sparse_mlp.configs import Config, heuristic
from pallas_kernels.tuned import choose


def sparse_mlp(
    x: Array,
    gate: Array | None,
    up: Array,
    down: Array,
    blocks: Array,
    count: Array,
    *,
    block_size: int,
    activation: str,
    row_mask: Array | None = None,
    up_bias: Array | None = None,
    gate_bias: Array | None = None,
    down_bias: Array | None = None,
    config: Config | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B D"]:
    """`down(act(gate(x)) * up(x))`, or `down(act(up(x)))` without a gate, over the listed neurons.

    Sums are float32. As in a dense block, x and the hidden values are rounded to the weights' dtype
    before they are multiplied. Results do not depend on the run: there are no atomics.

    Args:
      x: float[B, D].
      gate, up, down: float[F, D] of one dtype, neuron-major: `down` is transposed.
      blocks: int[cap], one list for all rows (the union of what they need), or int[B, cap], one for
        each row. Block j holds the neurons from `j * block_size` on; the last may be short. Entries
        are distinct and below F / block_size; those from `count` on are not looked at.
      count: int[], or int[B] with lists per row.
      block_size: neurons of a block, any number from 1.
      activation: "silu", "gelu", "gelu_tanh", "relu" or "identity"; each is 0 at 0.
      row_mask: bool[B, cap], which listed blocks each row selected itself. The others add nothing
        to it, so a row's result does not depend on who shares the list. Without it they do.
      up_bias, gate_bias: float[F]. down_bias: float[D].
      config: the tiling; None takes what `pallas_kernels.tuned.choose` gives.
      implementation: see `pallas_kernels.dispatch.dispatch`.

    Raises:
      ValueError: if a shape, a dtype or a name does not fit.
    """
    _check(x, gate, up, down, blocks, count, row_mask, block_size, activation)
    hidden, width = up.shape
    biases = {"up_bias": up_bias, "gate_bias": gate_bias, "down_bias": down_bias}
    for name, bias in biases.items():
        if bias is not None:
            expect(name, bias, (width if name == "down_bias" else hidden,))
    if gate is None and gate_bias is not None:
        raise ValueError("gate_bias was given without gate; a plain block takes up_bias alone")
    lists = 1 if blocks.ndim == 1 else len(blocks)
    rows, entries = len(x) // lists, blocks.shape[-1]
    sizes = (rows, lists, width, entries * block_size, up.dtype.itemsize)
    config = config or choose("sparse_mlp", heuristic, *sizes, gates=int(gate is not None))
    y = dispatch(
        implementation,
        functools.partial(reference.sparse_mlp, block_size=block_size, activation=activation),
        functools.partial(
            _sparse_mlp,
            block_size=block_size,
            activation=activation,
            config=config,
        ),
        x.astype(up.dtype).reshape(lists, rows, width), gate, up, down,
        blocks.astype(jnp.int32).reshape(lists, entries),
        count.astype(jnp.int32).reshape(lists),
        None if row_mask is None else row_mask.reshape(lists, rows, entries),
        up_bias, gate_bias,
    )  # fmt: skip
    y = y.reshape(x.shape)
    return y if down_bias is None else y + down_bias.astype(jnp.float32)


def _check(x, gate, up, down, blocks, count, row_mask, block_size, activation) -> None:
    expect("up", up, (None, None))
    for name, w in (("gate", gate), ("down", down)):
        if w is not None:
            expect(name, w, up.shape)
            if w.dtype != up.dtype:
                raise ValueError(f"{name} must have the dtype of up, {up.dtype}, got {w.dtype}")
    expect("x", x, (None, up.shape[1]))
    batch = len(x)
    if blocks.ndim == 2:
        expect("blocks", blocks, (batch, None))
        expect("count", count, (batch,))
        if row_mask is not None:
            raise ValueError(
                f"row_mask belongs to one list that all rows share, got lists {list(blocks.shape)} "
                "per row; leave a row's unwanted blocks out of its list"
            )
    else:
        expect("blocks", blocks, (None,))
        expect("count", count, ())
    if row_mask is not None:
        expect("row_mask", row_mask, (batch, blocks.shape[-1]))
    if batch < 1 or blocks.shape[-1] < 1 or block_size < 1:
        raise ValueError(
            f"x needs a row, blocks an entry and block_size a neuron, got x {list(x.shape)}, "
            f"blocks {list(blocks.shape)} and block_size {block_size}"
        )
    for name, index in (("blocks", blocks), ("count", count)):
        if not jnp.issubdtype(index.dtype, jnp.integer):
            raise ValueError(f"{name} must be integers, got {index.dtype}")
    check_activation(activation)


def _sparse_mlp(*args, **options):
    from pallas_kernels.sparse_mlp import triton  # a CPU never pays for Pallas

    return triton.sparse_mlp(*args, **options)
