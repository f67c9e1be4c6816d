"""Packed codes as numbers, inside of a kernel for the Triton back end.

A code becomes a number without a conversion, which runs at a sixteenth of the rate of other
instructions: its bits go to the top of the mantissa of 1, which gives 1 + code / 2**bits exactly,
and with `unit = 2**bits * scale` and `offset = zero - unit` the number is that times `unit` plus
`offset`. In float16 two neighbours share every instruction: a rotated pair of half words is masked
and scaled as one register, one and a half instructions a code.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

MANTISSA, ONE = 23, 0x3F800000  # of float32


def unit_and_offset(scale, zero, bits: int):
    """What `numbers` takes for groups that read as `code * scale + zero`."""
    unit = scale * jnp.asarray(2**bits, scale.dtype)
    return unit, zero - unit


def numbers(words, bits: int, lane: int, unit, offset=None, *, interpret: bool):
    """`(1 + code / 2**bits) * unit + offset` of the codes at `lane` of `words` u32[A, B], in the
    dtype of `unit` [A, B]; B has an even number of entries."""
    if unit.dtype == jnp.float16 and not interpret:
        return _pairs(words, bits, lane, unit, offset)
    code = (words >> jnp.uint32(bits * lane)) & jnp.uint32(2**bits - 1)
    pattern = (code << jnp.uint32(MANTISSA - bits)) | jnp.uint32(ONE)
    raised = jax.lax.bitcast_convert_type(pattern, jnp.float32) * unit.astype(jnp.float32)
    raised = raised if offset is None else raised + offset.astype(jnp.float32)
    return raised.astype(unit.dtype)


def _pairs(words, bits: int, lane: int, unit, offset):
    half, place = divmod(bits * lane, 16)
    top = 10 - bits  # of the 10 bits of a float16's mantissa
    mask = ((2**bits - 1) << top) * 0x10001
    move = f"shl.b32 t, t, {top - place};" if top > place else f"shr.b32 t, t, {place - top};"
    last = "mul.rn.f16x2 $0, t, $3;" if offset is None else "fma.rn.f16x2 $0, t, $3, $4;"
    code = f"""{{ .reg .b32 t;
        prmt.b32 t, $1, $2, {0x7632 if half else 0x5410}; {move if top != place else ""}
        lop3.b32 t, t, {mask}, 0x3C003C00, 0xEA; {last} }}"""
    args = [words, unit] if offset is None else [words, unit, offset]
    (found,) = plgpu.elementwise_inline_asm(
        code, args=args, constraints="=r,r,r" + ",r" * (len(args) - 1), pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(words.shape, jnp.float16)],
    )  # fmt: skip
    return found


def exp2(x, *, interpret: bool):
    """2**x; without the instructions by which the compiler keeps results below 2**-126."""
    if interpret:
        return jnp.exp2(x)
    (found,) = plgpu.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;", args=[x], constraints="=f,f", pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )  # fmt: skip
    return found
