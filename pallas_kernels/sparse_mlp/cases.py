"""Uses of a feed-forward block of which a part is read."""

import functools
import itertools
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from pallas_kernels.cases import (
    Case,
    Problem,
    Rng,
    TunedUse,
    array,
    some,
    tolerance_of,
)
from pallas_kernels.sparse_mlp import sparse_mlp
from pallas_kernels.sparse_mlp.configs import candidates

ROWS = (1, 16)
BLOCKS = ((4096, 11008), (8192, 28672))  # D, F of large models
TINY_BLOCKS = ((64, 160),)


def cases() -> Iterator[Case]:
    for name, d, f in (("smollm2", 576, 1536), ("llama-2 7B", 4096, 11008)):
        for rows in (1, 16):
            for launch in ("sparse_mlp_up", "sparse_mlp_down"):
                weight, blocks = array(f, d), f // 32
                yield Case(
                    launch=launch, config=f"{name}, {rows} row{'s'[: rows > 1]}, all blocks",
                    operations=2 * rows * d * f * (2 if launch.endswith("up") else 1),
                    function=functools.partial(sparse_mlp, block_size=32, activation="silu"),
                    args=(
                        array(rows, d), weight, weight, weight, array(blocks, dtype="int32"),
                        array(dtype="int32"),
                    ),
                    bytes=2 * d * f * (2 if launch.endswith("up") else 1),
                )  # fmt: skip


def problem(rng: Rng, quick: bool) -> Problem:
    d, f, size = (64, 200, 16) if quick else (int(rng.choice([576, 1024])), 3001, 32)
    kind = str(rng.choice(["one row", "shared list", "list per row"]))
    b = {"one row": 1, "shared list": int(rng.integers(2, 40)), "list per row": 3}[kind]
    dtype, total = rng.choice(["float32", "bfloat16"]), -(-f // size)
    cap = int(rng.integers(1, total + 1))
    lists = b if kind == "list per row" else 1
    blocks = np.stack([rng.permutation(total)[:cap] for _ in range(lists)])
    count = rng.integers(1, cap + 1, lists)
    if lists == 1:
        blocks, count = blocks[0], count[0]
    gate = some(rng, dtype, f, d) if rng.random() < 0.5 else None
    run = functools.partial(
        sparse_mlp, block_size=size, activation=str(rng.choice(["silu", "relu"]))
    )
    x = jnp.asarray(rng.normal(size=(b, d)) / d**0.5, dtype)
    up, down = some(rng, dtype, f, d), some(rng, dtype, f, d)
    args = (x, gate, up, down, jnp.asarray(blocks, jnp.int32), jnp.asarray(count, jnp.int32))
    facts = {"shape": [b, d, f], "kind": kind, "is_gated": gate is not None, "dtype": str(dtype)}
    return Problem(run=run, args=args, tolerance=tolerance_of(dtype), facts=facts)


def tuned(quick: bool) -> Iterator[TunedUse]:
    blocks = TINY_BLOCKS if quick else BLOCKS
    for (d, f), rows, density in itertools.product(blocks, ROWS, (1.0, 0.25)):
        yield TunedUse(
            kernel="sparse_mlp", sizes={"rows": rows, "d": d, "f": f, "density": density},
            candidates=candidates, tolerance=3e-2,
        )  # fmt: skip


CASES = {"sparse_mlp": cases}
PROBLEMS = {"sparse_mlp": problem}
TUNED = {"sparse_mlp": tuned}
