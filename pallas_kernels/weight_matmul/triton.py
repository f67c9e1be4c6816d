"""Products with quantized weights for the Triton back end.

A program owns a tile of words of one weight, that is 32 / bits tiles of outputs, and one part of
the groups of inputs; XLA adds the parts. What bounds it is not memory but instructions, as in
`kivi_attention`: words move to the registers that the tensor cores read, and become numbers there.
Four bits c at the top of the mantissa of 1 are the bfloat16 number 1 + c / 16, exactly; two
neighbouring inputs of an output share every instruction, one and an eighth for each code. What the
dot of these has too much is the same for all outputs, a sixteenth of it being the sum of the
group's inputs, and is taken off with the zero point. A code of 8 bits is two of 4.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.common import launch, load, store
from pallas_kernels.shapes import blocks_of
from pallas_kernels.weight_matmul.configs import Config
from pallas_kernels.weight_matmul.reference import QuantizedWeight

NIBBLES = 8  # of a word


def weight_matmul(x, weights: tuple[QuantizedWeight, ...], *, config: Config, interpret):
    rows = x.shape[0]
    given = [(w.codes, w.scale, *(() if w.zero is None else (w.zero,))) for w in weights]
    kernel = functools.partial(
        _kernel, counts=[len(one) for one in given], bits=weights[0].bits, group=weights[0].group,
        config=config, interpret=interpret,
    )  # fmt: skip
    parts = launch(
        kernel, x.astype(jnp.bfloat16), *(leaf for one in given for leaf in one),
        out=tuple(
            jax.ShapeDtypeStruct((config.splits, rows, w.outputs), jnp.float32) for w in weights
        ),
        grid=(
            blocks_of(rows, config.rows),
            sum(blocks_of(w.codes.shape[1], config.words) for w in weights),
            config.splits,
        ),
        name="weight_matmul", warps=config.warps, stages=config.stages, interpret=interpret,
    )  # fmt: skip
    return tuple(part.sum(axis=0) for part in parts)


def _kernel(x_ref, *refs, counts, bits, group, config: Config, interpret):
    refs, results = list(refs[: -len(counts)]), refs[-len(counts) :]
    rows = pl.program_id(0) * config.rows + jnp.arange(config.rows)
    first, program, split = 0, pl.program_id(1), pl.program_id(2)
    for out_ref, count in zip(results, counts, strict=True):
        mine, refs = refs[:count], refs[count:]
        word = (program - first) * config.words + jnp.arange(config.words)
        run = functools.partial(
            _product, x_ref, *mine, out_ref=out_ref, rows=rows, word=word, split=split, bits=bits,
            group=group, config=config, interpret=interpret,
        )  # fmt: skip
        blocks = blocks_of(mine[0].shape[1], config.words)
        if len(counts) == 1:
            run()
        else:
            pl.when((program >= first) & (program < first + blocks))(run)
        first += blocks


def _product(
    x_ref, codes_ref, scale_ref, zero_ref=None,
    *, out_ref, rows, word, split, bits, group, config: Config, interpret,
):  # fmt: skip
    groups, outputs = scale_ref.shape
    exists, here = rows < x_ref.shape[0], word < codes_ref.shape[1]
    lanes, depth = 32 // bits, min(config.depth, group)
    places = [lane * codes_ref.shape[1] + word for lane in range(lanes)]
    inside = [here & (place < outputs) for place in places]
    shape = (config.words, config.rows)
    part = blocks_of(groups, config.splits)

    def per_output(ref, g):
        """f32[words, 1] of each lane: the scales or zero points of group g."""
        return [
            load(ref.at[g, place], mask=mask, other=0).astype(jnp.float32)[:, None]
            for place, mask in zip(places, inside, strict=True)
        ]

    def body(g, sums):
        raised = [jnp.zeros(shape, jnp.float32)] * NIBBLES
        ones = raised[0]  # the sum of the inputs, in every row
        for step in range(0, group, depth):
            inputs = g * group + step + jnp.arange(depth)
            mask = jnp.broadcast_to(here[None], (depth, config.words))
            words = load(codes_ref.at[inputs[:, None], word[None]], mask=mask, other=0).T
            mask = jnp.broadcast_to(exists[None], (depth, config.rows))
            x = load(x_ref.at[rows[None], inputs[:, None]], mask=mask, other=0)
            ones += plgpu.dot(jnp.ones((config.words, depth), x.dtype), x)
            raised = [
                total + plgpu.dot(nibbles(words, nibble, interpret=interpret), x)
                for nibble, total in enumerate(raised)
            ]
        surplus = 16.0
        if bits == 8:
            raised = [16 * high + low for low, high in zip(raised[::2], raised[1::2], strict=True)]
            surplus += 256.0
        zeros = [2.0 ** (bits - 1)] * lanes if zero_ref is None else per_output(zero_ref, g)
        return tuple(
            total + (16 * one - (surplus + zero) * ones) * scale
            for total, one, zero, scale in zip(
                sums, raised, zeros, per_output(scale_ref, g), strict=True
            )
        )

    sums = jax.lax.fori_loop(
        split * part, jnp.minimum((split + 1) * part, groups), body,
        (jnp.zeros(shape, jnp.float32),) * lanes,
    )  # fmt: skip
    for total, place, mask in zip(sums, places, inside, strict=True):
        mask = exists[None] & mask[:, None]
        store(out_ref.at[split, rows[None], place[:, None]], total, mask=mask)


def nibbles(words, nibble: int, *, interpret: bool):
    """bf16 `1 + c / 16` of the four bits c at `nibble` of `words` u32[A, B]; B is even."""
    if interpret:
        code = (words >> jnp.uint32(4 * nibble)) & jnp.uint32(15)
        raised = (code << jnp.uint32(19)) | jnp.uint32(0x3F800000)  # of float32, which ends in 0
        return jax.lax.bitcast_convert_type(raised, jnp.float32).astype(jnp.bfloat16)
    half, place = divmod(4 * nibble, 16)
    top = 3  # of the 7 bits of a bfloat16's mantissa
    move = f"shl.b32 t, t, {top - place};" if place < top else f"shr.b32 t, t, {place - top};"
    (found,) = plgpu.elementwise_inline_asm(
        f"""{{ .reg .b32 t;
        prmt.b32 t, $1, $2, {0x7632 if half else 0x5410}; {move}
        lop3.b32 $0, t, 0x00780078, 0x3F803F80, 0xEA; }}""",
        args=[words], constraints="=r,r,r", pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(words.shape, jnp.bfloat16)],
    )  # fmt: skip
    return found
