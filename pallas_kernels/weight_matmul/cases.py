"""Uses of products of a few rows with weights of 4 and 8 bits."""

import functools
import itertools
from collections.abc import Iterator

import jax

from pallas_kernels.cases import (
    Case,
    Problem,
    Rng,
    TunedUse,
    array,
    some,
)
from pallas_kernels.weight_matmul import quantize_weight, weight_matmul
from pallas_kernels.weight_matmul.configs import candidates

ROWS = (1, 16)
PRODUCTS = ((4096, 4096), (4096, 11008), (11008, 4096), (4096, 32000))  # I, O of Llama-2-7B
TINY_PRODUCTS = ((128, 192),)


def cases() -> Iterator[Case]:
    for name, inputs, outputs, group in (
        ("smollm2 up", 576, 1536, 64),
        ("smollm2 head", 576, 49152, 64),
        ("llama-2 7B up", 4096, 11008, 128),
        ("llama-2 7B down", 11008, 4096, 128),
    ):
        for bits in (4, 8):
            quantize = functools.partial(quantize_weight, bits=bits, group=group)
            weight = jax.eval_shape(quantize, array(outputs, inputs))
            for rows in (1, 16, 64):
                yield Case(
                    config=f"{name}, {bits} bits, {rows} row{'s'[: rows > 1]}",
                    function=weight_matmul, args=(array(rows, inputs), weight),
                    operations=2 * rows * inputs * outputs,
                )  # fmt: skip


def problem(rng: Rng, quick: bool) -> Problem:
    rows, bits = int(rng.choice([1, 3, 16, 40])), int(rng.choice([4, 8]))
    group = int(rng.choice([32, 64, 128]))
    outputs, inputs = (
        int(rng.integers(100, 300 if quick else 3000)),
        group * int(rng.integers(1, 9)),
    )
    stored = quantize_weight(some(rng, "float32", outputs, inputs), bits, group)
    x = some(rng, rng.choice(["float32", "bfloat16"]), rows, inputs)
    facts = {"shape": [rows, outputs, inputs], "bits": bits, "group": group}
    # both round x to bfloat16; what remains is the order of float32 sums
    return Problem(run=weight_matmul, args=(x, stored), tolerance=5e-6, widens=False, facts=facts)


def product_sizes(quick: bool, *bits: int) -> Iterator[dict[str, int]]:
    """Products with weights of so many bits."""
    products = TINY_PRODUCTS if quick else PRODUCTS
    for (inputs, outputs), rows, width in itertools.product(products, ROWS, bits):
        yield {"rows": rows, "i": inputs, "o": outputs, "bits": width}


def tuned(quick: bool) -> Iterator[TunedUse]:
    for sizes in product_sizes(quick, 4, 8):
        yield TunedUse(kernel="weight_matmul", sizes=sizes, candidates=candidates, tolerance=5e-5)


CASES = {"weight_matmul": cases}
PROBLEMS = {"weight_matmul": problem}
TUNED = {"weight_matmul": tuned}
