"""Uses of attention over selected heads."""

import functools
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from pallas_kernels.cases import (
    Case,
    Problem,
    Rng,
    TunedUse,
    array,
    facts_of,
    queries,
    some,
    some_slots,
    tolerance_of,
    tuned_shapes,
)
from pallas_kernels.sparse_heads import sparse_heads
from pallas_kernels.sparse_heads.configs import candidates


def cases() -> Iterator[Case]:
    b, k, g, h, slots = 8, 8, 4, 128, 8192
    yield Case(
        config="llama-3 8B, 8 rows, 8k, half the groups", operations=4 * b * k // 2 * g * slots * h,
        function=functools.partial(sparse_heads, scale=h**-0.5),
        args=(
            array(b, k, g, h), array(b, k, slots, h), array(b, k, slots, h),
            array(b, dtype="int32"), array(b, k // 2, dtype="int32"), array(b, dtype="int32"),
        ),
        bytes=2 * b * k // 2 * slots * h * 2,
    )  # fmt: skip


def problem(rng: Rng, quick: bool) -> Problem:
    q, dtype, (b, k, _, _, h) = queries(rng, quick, sizes=(64, 80, 128), most=1)
    s, cap = some_slots(rng, quick), int(rng.integers(1, k + 1))
    groups = np.stack([rng.permutation(k)[:cap] for _ in range(b)])
    integers = rng.integers(0, s + 1, b), groups, rng.integers(0, cap + 1, b)
    args = (q[:, :, :, 0], some(rng, dtype, b, k, s, h), some(rng, dtype, b, k, s, h))
    run = functools.partial(sparse_heads, scale=float(h**-0.5))
    args += tuple(jnp.asarray(x, jnp.int32) for x in integers)
    facts = facts_of(q, slots=s, dtype=dtype)
    return Problem(run=run, args=args, tolerance=tolerance_of(dtype), facts=facts)


def tuned(quick: bool) -> Iterator[TunedUse]:
    for sizes in tuned_shapes(quick):
        yield TunedUse(kernel="sparse_heads", sizes=sizes, candidates=candidates, tolerance=3e-2)


CASES = {"sparse_heads": cases}
PROBLEMS = {"sparse_heads": problem}
TUNED = {"sparse_heads": tuned}
