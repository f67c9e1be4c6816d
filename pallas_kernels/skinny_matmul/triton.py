"""The products of a few rows for the Triton back end.

A program owns a tile of outputs of one result, reads these rows of its weights once and adds them
up alone. Programs of several results stand one behind the other on the grid's first axis. What is
not live is masked out of a load, which then moves no byte.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.activation import KERNEL
from pallas_kernels.common import exact_dot, launch, load, store
from pallas_kernels.shapes import blocks_of
from pallas_kernels.skinny_matmul.configs import Config


def skinny_matmul(
    x, weights, biases, live, *, jobs, activation, dtype, parts, config: Config, interpret
):
    outputs = [w.shape[0] for w in weights][:: len(weights) // len(jobs)]
    kernel = functools.partial(
        _kernel, given=tuple((b is not None, some is not None) for b, some in
        zip(biases, live, strict=True)), jobs=jobs, parts=parts, activation=activation,
        config=config,
    )  # fmt: skip
    blocks = sum(blocks_of(n, config.outputs) for n in outputs)
    live = [None if some is None else some.astype(jnp.int8) for some in live]
    given = [y for one in zip(weights, biases, live, strict=True) for y in one if y is not None]
    return launch(
        kernel, x, *given,
        out=tuple(jax.ShapeDtypeStruct((len(x), n), dtype) for n in outputs),
        grid=(blocks, blocks_of(len(x), config.rows)),
        name="skinny_matmul", warps=config.warps, stages=config.stages, interpret=interpret,
    )  # fmt: skip


def _kernel(x_ref, *refs, given, jobs, parts, activation, config: Config):
    left, results = iter(refs[: -len(jobs)]), refs[-len(jobs) :]
    operands = iter([
        Operand(next(left), next(left) if biased else None, next(left) if some else None, parts)
        for biased, some in given
    ])  # fmt: skip
    first, program = 0, pl.program_id(0)
    row = pl.program_id(1) * config.rows + jnp.arange(config.rows)
    for out_ref, count in zip(results, jobs, strict=True):
        mine = [next(operands) for _ in range(count)]
        output = (program - first) * config.outputs + jnp.arange(config.outputs)
        run = functools.partial(_result, x_ref, mine, out_ref, row, output, activation, config)
        blocks = blocks_of(out_ref.shape[1], config.outputs)
        if len(jobs) == 1:
            run()
        else:
            pl.when((program >= first) & (program < first + blocks))(run)
        first += blocks


class Operand(NamedTuple):
    """The references of a weight, its bias and its live parts; the latter two may be None."""

    weight: Any
    bias: Any
    live: Any
    parts: str

    def mask(self, exists, index, axis: int):
        """Which of the weight's rows (axis 0) or columns (1) are read."""
        if self.live is None or axis != int(self.parts == "inputs"):
            return exists
        part = index // (self.weight.shape[axis] // self.live.shape[0])
        return exists & (load(self.live.at[part], mask=exists, other=0) != 0)


def _result(x_ref, operands, out_ref, row, output, activation, config: Config):
    here = output < out_ref.shape[1]
    sums = _sums(x_ref, operands, row, output, here, config)
    first, *more = (
        s if bias is None else s + load(bias.at[output], mask=here, other=0.0).astype(s.dtype)[None]
        for s, (_, bias, _, _) in zip(sums, operands, strict=True)
    )
    y = first if activation is None else KERNEL[activation](first)
    y = y * more[0] if more else y
    mask = (row < x_ref.shape[0])[:, None] & here[None]
    store(out_ref.at[row[:, None], output[None]], y.astype(out_ref.dtype), mask=mask)


def _sums(x_ref, operands, row, output, here, config: Config):
    """x w^T, f32[rows, outputs of the tile], for each weight."""
    rows, width = x_ref.shape
    one = config.rows == 1
    outputs = [operand.mask(here, output, 0) for operand in operands]

    def body(i, sums):
        column = i * config.depth + jnp.arange(config.depth)
        inside = column < width
        tiles = (
            load(
                operand.weight.at[output[:, None], column[None]],
                mask=read[:, None] & operand.mask(inside, column, 1)[None], other=0.0,
            )
            for operand, read in zip(operands, outputs, strict=True)
        )  # fmt: skip
        if one:
            x = load(x_ref.at[row[0], column], mask=inside, other=0.0).astype(jnp.float32)
            return tuple(s + w.astype(jnp.float32) * x for s, w in zip(sums, tiles, strict=True))
        mask = (row < rows)[:, None] & inside[None]
        x = load(x_ref.at[row[:, None], column[None]], mask=mask, other=0.0)
        return tuple(s + exact_dot(x, w.T) for s, w in zip(sums, tiles, strict=True))

    # A single row sums over the threads once, behind the loop.
    shape = (config.outputs, config.depth) if one else (config.rows, config.outputs)
    zeros = tuple(jnp.zeros(shape, jnp.float32) for _ in operands)
    sums = jax.lax.fori_loop(0, blocks_of(width, config.depth), body, zeros)
    return [jnp.sum(s, axis=1)[None] for s in sums] if one else list(sums)
