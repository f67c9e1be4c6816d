"""Uses of a decode step's write into a quantized cache."""

import functools
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from pallas_kernels.cases import (
    Case,
    Problem,
    Rng,
    TunedUse,
    array,
    packed_half,
    packed_shapes,
    some,
)
from pallas_kernels.kivi_attention.reference import unpacked
from pallas_kernels.kivi_push import kivi_push
from pallas_kernels.kivi_push.configs import candidates


def cases() -> Iterator[Case]:
    r, bits, number = 128, 2, 2 / 8 + 4 / 32  # bytes of a packed number with its scale and zero
    for name, b, k, h in (("llama-3 8B, 8 rows", 8, 8, 128), ("smollm2, 1 row", 1, 3, 64)):
        rows, tail, new = array(b, dtype="int32"), array(b, k, r, h), array(b, k, 1, h)
        halves = [packed_shapes(b, k, 32768, h, bits, axis) for axis in (2, 3)]
        for flush, per_token in (("sliding", 2 + number + 2), ("block", 2 * (2 + number))):
            yield Case(
                config=f"{name}, {flush}, a complete block", operations=16 * b * k * h * r,
                function=functools.partial(kivi_push, key_bits=bits, value_bits=bits, flush=flush),
                args=(*halves, tail, tail, new, new, rows, rows),
                bytes=round(b * k * h * (r * per_token + 8)),
            )  # fmt: skip


def problem(rng: Rng, quick: bool) -> Problem:
    """Codes as numbers, as in that of `quantize_pack`; where the tail's keys are what codes read
    as, one that differs by 1 moves a key by a step, which is at most twice the largest one over the
    levels."""
    b, k, h = int(rng.integers(2, 5)), int(rng.integers(1, 9)), int(rng.choice([64, 128]))
    bits = [int(x) for x in rng.choice([2, 4, 8], 2)]
    group, flush = int(rng.choice([32, 64])), str(rng.choice(["sliding", "block"]))
    residual, dtype = group * int(rng.integers(1, 4)), rng.choice(["float32", "bfloat16"])
    room = residual * 4
    halves = [
        packed_half(rng.normal(size=(b, k, room, h)), bits[i], group, axis=2 + i) for i in range(2)
    ]
    stored, count = rng.integers(0, room + residual, b), rng.integers(0, 2, b)
    stored[0], count[0] = residual * rng.integers(1, 5) - 1, 1  # which completes a block
    numbers = (some(rng, dtype, b, k, n, h) for n in (residual, residual, 1, 1))
    args = *halves, *numbers, *(jnp.asarray(x, jnp.int32) for x in (stored, count))

    def run(*args, implementation):
        *halves, tail_k, tail_v = kivi_push(
            *args, key_bits=bits[0], value_bits=bits[1], flush=flush, implementation=implementation
        )
        one, none = jnp.ones((1, 1, 1, 1)), jnp.zeros((1, 1, 1, 1))
        codes = [
            unpacked(half.words, one, none, bits[i], token_words=i == 0)
            for i, half in enumerate(halves)
        ]
        return codes, [half[1:] for half in halves], tail_k, tail_v

    facts = {"shape": [b, k, residual, h], "bits": bits, "group": group, "flush": flush}
    steps = 2.001 if flush == "sliding" else 1.001
    tolerance = steps / (2 ** min(bits) - 1)
    return Problem(run=run, args=args, tolerance=tolerance, widens=False, facts=facts)


def numbers_of(results: Any, bits: int) -> Any:
    """Codes as numbers: next to a half one may differ by 1. No value goes behind 256."""
    (keys, values, *tails), _ = results
    one, none = jnp.ones((1, 1, 1, 1)), jnp.zeros((1, 1, 1, 1))
    codes = unpacked(values.words[:, :, :256], one, none, bits, False)
    return keys, codes, values[1:], tails


def tuned(quick: bool) -> Iterator[TunedUse]:
    """By the usual step, which completes no block."""
    for bits in (2, 4):
        yield TunedUse(
            kernel="kivi_push", candidates=candidates, tolerance=1.001 / (2**bits - 1),
            sizes={"bits": bits, "group": 32}, view=functools.partial(numbers_of, bits=bits),
        )  # fmt: skip


CASES = {"kivi_push": cases}
PROBLEMS = {"kivi_push": problem}
TUNED = {"kivi_push": tuned}
