"""Products with a quantized weight for the Triton back end.

A program owns a tile of words, that is 32 / bits tiles of outputs, and one part of the groups of
inputs; XLA adds the parts. Codes become numbers in registers only. The bits of a code c, put into
the leading bits of the mantissa of 2**bits, are the float32 number 2**bits + c: a shift and a mask
instead of a conversion (after arXiv 2211.10017, which does so in float16). A dot takes c - zero,
which is exact in bfloat16; multiply and sum takes the surplus off the sum of a group.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.common import blocks_of, launch, load, store
from pallas_kernels.weight_matmul.configs import Config
from pallas_kernels.weight_matmul.reference import QuantizedWeight

MANTISSA, BIAS = 23, 127  # of float32


def weight_matmul(x, weight: QuantizedWeight, *, config: Config, interpret):
    rows, outputs = x.shape[0], weight.outputs
    zero = () if weight.zero is None else (weight.zero,)
    partial = launch(
        functools.partial(_kernel, config=config, bits=weight.bits, group=weight.group),
        x.astype(jnp.bfloat16), weight.codes, weight.scale, *zero,
        out=jax.ShapeDtypeStruct((config.splits, rows, outputs), jnp.float32),
        grid=(
            blocks_of(rows, config.rows),
            blocks_of(weight.codes.shape[1], config.words),
            config.splits,
        ),
        name="weight_matmul", warps=config.warps, stages=config.stages, interpret=interpret,
    )  # fmt: skip
    return partial.sum(axis=0)


def _kernel(x_ref, codes_ref, scale_ref, *refs, config: Config, bits: int, group: int):
    *zero_ref, out_ref = refs
    groups, outputs = scale_ref.shape
    words = Words(codes_ref, pl.program_id(1) * config.words + jnp.arange(config.words), bits)
    rows = pl.program_id(0) * config.rows + jnp.arange(config.rows)
    split, part = pl.program_id(2), blocks_of(groups, config.splits)
    is_sum = config.rows == 1
    places = [words.outputs(lane) for lane in range(words.lanes)]
    inside = [words.inside & (place < outputs) for place in places]

    def per_output(ref, g):
        """f32[1, words] of each lane: the scales or zero points of group g."""
        return [
            load(ref.at[g, place], mask=mask, other=0).astype(jnp.float32)[None]
            for place, mask in zip(places, inside, strict=True)
        ]

    def body(g, sums):
        zeros = per_output(zero_ref[0], g) if zero_ref else [2.0 ** (bits - 1)] * words.lanes
        if is_sum:
            parts = _summed(x_ref, rows, words, zeros, g * group, group, config.depth)
        else:
            parts = _dotted(x_ref, rows, words, zeros, g * group, group)
        scales = per_output(scale_ref, g)
        return tuple(a + p * s for a, p, s in zip(sums, parts, scales, strict=True))

    height = min(config.depth, group) if is_sum else config.rows
    sums = jax.lax.fori_loop(
        split * part, jnp.minimum((split + 1) * part, groups), body,
        (jnp.zeros((height, config.words), jnp.float32),) * words.lanes,
    )  # fmt: skip
    exists = rows < out_ref.shape[1]
    for total, place, mask in zip(sums, places, inside, strict=True):
        total = jnp.sum(total, axis=0)[None] if is_sum else total
        store(
            out_ref.at[split, rows[:, None], place[None]], total,
            mask=exists[:, None] & mask[None],
        )  # fmt: skip


def _summed(x_ref, row, words, zeros, first, group, depth):
    """Products of one row with a group of inputs, f32[depth, words] per lane, to be summed."""
    depth = min(depth, group)
    parts = [jnp.zeros((depth, words.count), jnp.float32)] * words.lanes
    activations = jnp.zeros((depth, 1), jnp.float32)
    for step in range(0, group, depth):
        inputs = first + step + jnp.arange(depth)
        x = load(x_ref.at[row[None], inputs[:, None]]).astype(jnp.float32)
        codes = words.load(inputs)
        parts = [part + x * words.raised(codes, lane) for lane, part in enumerate(parts)]
        activations += x
    return [
        part - activations * (words.base + zero) for part, zero in zip(parts, zeros, strict=True)
    ]


def _dotted(x_ref, rows, words, zeros, first, group):
    """Products of all rows with a group of inputs, f32[rows, words] per lane."""
    inputs = first + jnp.arange(group)
    mask = jnp.broadcast_to((rows < x_ref.shape[0])[:, None], (rows.shape[0], group))
    x = load(x_ref.at[rows[:, None], inputs[None]], mask=mask, other=0)
    codes = words.load(inputs)
    return [
        plgpu.dot(x, (words.raised(codes, lane) - (words.base + zero)).astype(x.dtype))
        for lane, zero in enumerate(zeros)
    ]


class Words:
    """The words of a program: columns of the packed codes."""

    def __init__(self, ref, columns, bits: int):
        self.ref, self.columns, self.bits = ref, columns, bits
        self.count, self.lanes, self.base = columns.shape[0], 32 // bits, 2.0**bits
        self.inside = columns < ref.shape[1]

    def load(self, inputs):
        """u32[inputs, words]."""
        mask = jnp.broadcast_to(self.inside[None], (inputs.shape[0], self.count))
        return load(self.ref.at[inputs[:, None], self.columns[None]], mask=mask, other=0)

    def outputs(self, lane: int):
        return lane * self.ref.shape[1] + self.columns

    def raised(self, words, lane: int):
        """f32[inputs, words] of one lane: its codes plus `base`, exactly."""
        place = MANTISSA - self.bits
        up = place - lane * self.bits
        shifted = words << jnp.uint32(up) if up > 0 else words >> jnp.uint32(-up)
        code = shifted & jnp.uint32((2**self.bits - 1) << place)
        one = jnp.uint32((BIAS + self.bits) << MANTISSA)
        return jax.lax.bitcast_convert_type(code | one, jnp.float32)
