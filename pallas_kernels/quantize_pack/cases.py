"""Uses of the flush of a quantized cache."""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

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
from pallas_kernels.quantize_pack import quantize_pack
from pallas_kernels.quantize_pack.configs import candidates


def cases() -> Iterator[Case]:
    b, k, h, tokens = 8, 8, 128, 128
    for half, axis in (("keys", 2), ("values", 3)):
        numbers = b * k * h * tokens
        yield Case(
            config=f"llama-3 8B, 8 rows, 128 {half}, 2 bits", operations=8 * numbers,
            function=functools.partial(quantize_pack, bits=2, per_channel=axis == 2),
            args=(
                packed_shapes(b, k, 32768, h, 2, axis), array(b, k, tokens, h),
                array(b, 1, dtype="int32"),
            ),
            bytes=numbers * 2 + numbers // 4 + numbers // 32 * 4,
        )  # fmt: skip


def problem(rng: Rng, quick: bool) -> Problem:
    """Codes as numbers: one may differ by 1 of 2**bits - 1, as quotients next to a half may."""
    b, k, h = int(rng.integers(1, 5)), int(rng.integers(1, 9)), int(rng.choice([64, 128]))
    bits, is_key = int(rng.choice([2, 4, 8])), bool(rng.integers(2))
    run_size, runs = (32, int(rng.integers(1, 4))) if is_key else (int(rng.choice([1, 4])), 1)
    half = packed_half(rng.normal(size=(b, k, 256, h)), bits, 32, axis=2 if is_key else 3)
    x = some(rng, rng.choice(["float32", "bfloat16"]), b, k, runs * run_size, h)
    places = [rng.permutation(256 // run_size)[:runs] for _ in range(b)]
    index = jnp.asarray(np.stack(places), jnp.int32)

    def numbers(half, x, index, implementation):
        new = quantize_pack(
            half, x, index, bits=bits, per_channel=is_key, implementation=implementation
        )
        one, none = jnp.ones((1, 1, 1, 1)), jnp.zeros((1, 1, 1, 1))
        return unpacked(new.words, one, none, bits, is_key), new.scale, new.zero

    facts = {"shape": [b, k, runs * run_size, h], "bits": bits, "per_channel": is_key}
    tolerance = 1.001 / (2**bits - 1)
    return Problem(
        run=numbers, args=(half, x, index), tolerance=tolerance, widens=False, facts=facts
    )


def numbers_of(results: Any, bits: int, is_key: bool) -> Any:
    """Codes as numbers: next to a half one may differ by 1. Nothing is written behind 384."""
    half, _ = results
    end = 384 * bits // 32 if is_key else 384
    one, none = jnp.ones((1, 1, 1, 1)), jnp.zeros((1, 1, 1, 1))
    return unpacked(half.words[:, :, :end], one, none, bits, is_key), half.scale, half.zero


def tuned(quick: bool) -> Iterator[TunedUse]:
    for is_key, bits in itertools.product((True, False), (2, 4)):
        yield TunedUse(
            kernel="quantize_pack", candidates=candidates, tolerance=1.001 / (2**bits - 1),
            sizes={"bits": bits, "group": 32, "is_key": is_key},
            view=functools.partial(numbers_of, bits=bits, is_key=is_key),
        )  # fmt: skip


CASES = {"quantize_pack": cases}
PROBLEMS = {"quantize_pack": problem}
TUNED = {"quantize_pack": tuned}
