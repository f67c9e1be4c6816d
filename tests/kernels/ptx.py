"""An interpreter of the few PTX instructions that the kernels write themselves.

`run` takes what `plgpu.elementwise_inline_asm` takes, on NumPy arrays, and lays elements into
registers as Triton does: `pack` neighbours along the last axis at a time, a 32-bit element a
register of its own and two 16-bit ones together, the first in the low half. Meanings are those of
the PTX ISA; what it does not know, and a register that is read before it is written, is an error.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Words = np.ndarray  # u32[...], one register of every thread
LITERAL = re.compile(r"(?<![\w$.])(0x[0-9A-Fa-f]+|\d+)(?![\w.])")


def run(
    asm: str,
    *,
    args: Sequence[np.ndarray],
    constraints: str,
    pack: int,
    result_shape_dtypes: Sequence[Any],
) -> list[np.ndarray]:
    """The arrays that the instructions make of `args`."""
    outputs = [count(one.dtype, pack) for one in result_shape_dtypes]
    inputs = [register for arg in args for register in into_registers(np.asarray(arg), pack)]
    kinds = constraints.split(",")
    expected = ["="] * sum(outputs) + [""] * len(inputs)
    if [kind[:-1] for kind in kinds] != expected or not {k[-1] for k in kinds} <= {"r", "f"}:
        raise ValueError(f"constraints {constraints!r} do not fit {outputs} and {len(inputs)}")
    registers = dict(zip((f"${i}" for i in range(sum(outputs), len(kinds))), inputs, strict=True))
    execute(asm, registers, [f"${i}" for i in range(sum(outputs))])
    made = iter([registers[f"${i}"] for i in range(sum(outputs))])
    return [
        from_registers([next(made) for _ in range(number)], one.shape, np.dtype(one.dtype))
        for one, number in zip(result_shape_dtypes, outputs, strict=True)
    ]


def count(dtype: Any, pack: int) -> int:
    """Registers of `pack` elements."""
    bits = pack * 8 * np.dtype(dtype).itemsize
    if bits % 32:
        raise ValueError(f"{pack} elements of {dtype} fill no whole register")
    return bits // 32


def into_registers(x: np.ndarray, pack: int) -> list[Words]:
    if x.shape[-1] % pack:
        raise ValueError(f"{x.shape[-1]} elements do not split into packs of {pack}")
    words = np.ascontiguousarray(x).view(np.uint32).reshape(-1, count(x.dtype, pack))
    return list(words.T)


def from_registers(registers: list[Words], shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return np.ascontiguousarray(np.stack(registers, -1)).view(dtype).reshape(shape)


def execute(asm: str, registers: dict[str, Words], results: list[str]) -> None:
    """Runs a block; `registers` holds the operands before, and everything after."""
    writable = set(results)
    for line in filter(None, map(str.strip, asm.strip().strip("{}").split(";"))):
        operation, rest = line.split(None, 1)
        operands = [part.strip() for part in rest.split(",")]
        if operation == ".reg":
            writable.add(operands[0].split()[-1])
            continue
        function, arity = INSTRUCTIONS[operation]
        target, *sources = operands
        if target not in writable or len(sources) != arity:
            raise ValueError(f"{line!r} writes an operand or has not {arity} sources")
        values = [
            np.uint32(int(source, 0)) if LITERAL.fullmatch(source) else registers[source]
            for source in sources
        ]
        with np.errstate(over="ignore", invalid="ignore"):
            registers[target] = function(*values)


def prmt(a: Words, b: Words, selector: np.uint32) -> Words:
    """Bytes of b:a, each picked by four bits; the highest of these repeats the byte's sign."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.zeros_like(a)
    for place in range(4):
        pick = int(selector) >> 4 * place & 15
        byte = (both >> np.uint64(8 * (pick & 7)) & np.uint64(255)).astype(np.uint32)
        if pick & 8:
            byte = np.where(byte & 128, 255, 0).astype(np.uint32)
        out |= byte << np.uint32(8 * place)
    return out


def lop3(a: Words, b: Words, c: Words, table: np.uint32) -> Words:
    """Bit for bit entry 4a + 2b + c of a table of 8 bits."""
    out = np.zeros_like(a)
    for entry in range(8):
        if int(table) >> entry & 1:
            chosen = [x if entry & bit else ~x for x, bit in ((a, 4), (b, 2), (c, 1))]
            out |= chosen[0] & chosen[1] & chosen[2]
    return out


def shifted(left: bool) -> Callable[[Words, np.uint32], Words]:
    def shift(a: Words, by: np.uint32) -> Words:
        if by > 31:
            return np.zeros_like(a)
        return a << by if left else a >> by

    return shift


def halves(function: Callable[..., np.ndarray]) -> Callable[..., Words]:
    """On both float16 of a register, with one rounding: a float64 holds the product exactly."""

    def apply(*values: Words) -> Words:
        numbers = [np.ascontiguousarray(x).view(np.float16).astype(np.float64) for x in values]
        return function(*numbers).astype(np.float16).view(np.uint32)

    return apply


def ex2(a: Words) -> Words:
    """Results below 2**-126 are 0."""
    found = np.exp2(a.view(np.float32))
    return np.where(found < np.finfo(np.float32).tiny, np.float32(0), found).view(np.uint32)


INSTRUCTIONS: dict[str, tuple[Callable[..., Words], int]] = {
    "prmt.b32": (prmt, 3),
    "lop3.b32": (lop3, 4),
    "shl.b32": (shifted(left=True), 2),
    "shr.b32": (shifted(left=False), 2),
    "mul.rn.f16x2": (halves(np.multiply), 2),
    "fma.rn.f16x2": (halves(lambda a, b, c: a * b + c), 3),
    "ex2.approx.ftz.f32": (ex2, 1),
}
