"""Uses of the residual sum and its norm."""

import functools
from collections.abc import Iterator

from pallas_kernels.add_norm import add_norm
from pallas_kernels.add_norm.configs import candidates
from pallas_kernels.cases import (
    Case,
    Problem,
    Rng,
    TunedUse,
    array,
    some,
    tolerance_of,
)


def cases() -> Iterator[Case]:
    for name, rows, width in (("smollm2, 1 row", 1, 576), ("llama-2 7B, 64 rows", 64, 4096)):
        yield Case(
            config=name, operations=6 * rows * width,
            function=functools.partial(add_norm, kind="rms", eps=1e-5),
            args=(array(rows, width), array(rows, width), array(width)),
        )  # fmt: skip


def problem(rng: Rng, quick: bool) -> Problem:
    rows, width = int(rng.integers(1, 9)), int(rng.integers(30, 100 if quick else 9000))
    dtype, kind = rng.choice(["float32", "bfloat16"]), rng.choice(["rms", "layer"])
    delta = some(rng, dtype, rows, width) if rng.random() < 0.7 else None
    scale, bias = (some(rng, dtype, width) for _ in range(2))
    args = (some(rng, dtype, rows, width), delta, scale, bias if kind == "layer" else None)
    return Problem(
        run=functools.partial(add_norm, kind=kind, eps=1e-5), args=args,
        tolerance=tolerance_of(dtype), facts={"shape": [rows, width], "kind": kind, "dtype": dtype},
    )  # fmt: skip


def tuned(quick: bool) -> Iterator[TunedUse]:
    for rows in (1, 8, 64):
        yield TunedUse(
            kernel="add_norm", sizes={"rows": rows}, candidates=candidates, tolerance=3e-2
        )


CASES = {"add_norm": cases}
PROBLEMS = {"add_norm": problem}
TUNED = {"add_norm": tuned}
