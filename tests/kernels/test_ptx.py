"""The instructions that kernels write themselves, interpreted on random words.

They are taken from the kernels as they run: `plgpu.elementwise_inline_asm` is the interpreter here.
"""

from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import ptx
import pytest
from jax.experimental.pallas import triton as plgpu

import pallas_kernels
from pallas_kernels.kivi_attention import codes
from pallas_kernels.quantization import pack
from pallas_kernels.weight_matmul import triton as weight_matmul

RNG = np.random.default_rng(0)
WORDS = RNG.integers(0, 2**32, (64, 16), dtype=np.uint32)
UNIT = RNG.uniform(0.01, 4, WORDS.shape).astype(np.float16)
OFFSET = RNG.uniform(-4, 4, WORDS.shape).astype(np.float16)
FORMS = [(bits, lane) for bits in (2, 4, 8) for lane in range(32 // bits)]


@pytest.fixture
def interpreted(monkeypatch):
    """The texts that were run; `change(text)` may be set to run another one."""
    seen = []

    def inline_asm(asm, **form):
        seen.append(asm)
        return ptx.run(inline_asm.change(asm), **form)

    inline_asm.change = lambda asm: asm
    monkeypatch.setattr(plgpu, "elementwise_inline_asm", inline_asm)
    return seen, inline_asm


def code_at(bits: int, lane: int) -> np.ndarray:
    return WORDS >> np.uint32(bits * lane) & np.uint32(2**bits - 1)


def half(bits: int, lane: int, offset: bool) -> np.ndarray:
    """What `codes.numbers` gives, by NumPy with one rounding."""
    exact = (1 + code_at(bits, lane) / 2**bits) * UNIT.astype(np.float64)
    return (exact + OFFSET if offset else exact).astype(np.float16)


def halves_found(bits: int, lane: int, offset: bool) -> np.ndarray:
    given = OFFSET if offset else None
    return np.asarray(codes.numbers(WORDS, bits, lane, UNIT, given, interpret=False))


@pytest.mark.parametrize("bits, lane", FORMS)
@pytest.mark.parametrize("offset", [True, False])
def test_codes_become_float16_numbers(bits, lane, offset, interpreted):
    np.testing.assert_array_equal(halves_found(bits, lane, offset), half(bits, lane, offset))


@pytest.mark.parametrize("nibble", range(8))
def test_nibbles_become_bfloat16_numbers(nibble, interpreted):
    found = np.asarray(weight_matmul.nibbles(WORDS, nibble, interpret=False))
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found.astype(np.float64), 1 + code_at(4, nibble) / 16)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_lanes_are_those_of_packing(bits, interpreted):
    numbers = RNG.integers(0, 2**bits, (8 * 32 // bits, 4)).astype(np.uint32)
    words = np.asarray(pack(jnp.asarray(numbers), bits, 0))
    one = np.ones(words.shape, np.float16)
    lanes = [
        np.asarray(codes.numbers(words, bits, lane, one, interpret=False), np.float64)
        for lane in range(32 // bits)
    ]
    found = (np.stack(lanes, 1).reshape(numbers.shape) - 1) * 2**bits
    np.testing.assert_array_equal(found, numbers)


def test_powers_of_two(interpreted):
    x = np.concatenate([RNG.uniform(-140, 20, 500), [-np.inf, 0.0, -126.0]]).astype(np.float32)
    wanted = np.exp2(x.astype(np.float64))
    found = np.asarray(codes.exp2(x, interpret=False))
    np.testing.assert_allclose(found, np.where(wanted < 2.0**-126, 0, wanted), rtol=2**-22)


USES = {
    **{f"float16, {b} bits at {n}": (lambda b=b, n=n: (halves_found(b, n, True), half(b, n, True)))
       for b, n in ((2, 3), (2, 13), (4, 1), (4, 7), (8, 0), (8, 3))},
    **{f"bfloat16, nibble {n}": (lambda n=n: (
        np.asarray(weight_matmul.nibbles(WORDS, n, interpret=False), np.float64),
        1 + code_at(4, n) / 16)) for n in (0, 3, 4, 7)},
}  # fmt: skip


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_every_constant_matters(use, interpreted):
    seen, inline_asm = interpreted
    use()
    literals = list(ptx.LITERAL.finditer(seen[0]))
    assert len(literals) >= 3
    for literal in literals:
        value = int(literal.group(), 0)
        caught = []
        for other in (value ^ 1, value ^ 0x10, value & (value - 1)):  # a selector has idle digits
            inline_asm.change = lambda asm, at=literal, to=other: (
                asm[: at.start()] + str(to) + asm[at.end() :]
            )
            found, wanted = use()
            caught.append((found != wanted).any())
        assert any(caught), f"{literal.group()} in {seen[0]}"


@pytest.mark.parametrize(
    "constraints", ["=r,r", "=r,r,r,r", "r,r,r", "=r,=r,r", "=h,r,r"], ids=range(5)
)
def test_other_constraints_are_refused(constraints, interpreted, monkeypatch):
    _, inline_asm = interpreted
    monkeypatch.setattr(
        plgpu,
        "elementwise_inline_asm",
        lambda asm, **form: inline_asm(asm, **form | {"constraints": constraints}),
    )
    with pytest.raises(ValueError, match="constraints"):
        weight_matmul.nibbles(WORDS, 0, interpret=False)


def test_a_register_has_a_value_before_it_is_read():
    with pytest.raises(KeyError):
        ptx.execute("{ .reg .b32 t; shl.b32 $0, t, 3; }", {"$1": WORDS}, ["$0"])
    with pytest.raises(ValueError, match="writes an operand"):
        ptx.execute("shl.b32 $1, $1, 3;", {"$1": WORDS}, ["$0"])


def test_no_kernel_writes_other_instructions():
    """A new one belongs into `ptx.py`, and its use into this file."""
    folder = Path(pallas_kernels.__file__).parent
    users = [path for path in folder.rglob("*.py") if "inline_asm" in path.read_text()]
    assert {path.relative_to(folder).as_posix() for path in users} == {
        "kivi_attention/codes.py", "weight_matmul/triton.py",
    }  # fmt: skip
