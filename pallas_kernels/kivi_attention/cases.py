"""Uses of attention over packed codes."""

import functools
import itertools
from collections.abc import Iterator

from pallas_kernels.cases import (
    Case,
    Problem,
    Rng,
    TunedUse,
    array,
    extra_keys,
    facts_of,
    masks,
    packed_half,
    packed_shapes,
    queries,
    some_slots,
    tolerance_of,
    tuned_shapes,
)
from pallas_kernels.kivi_attention import kivi_attention
from pallas_kernels.kivi_attention.configs import candidates


def cases() -> Iterator[Case]:
    for name, b, k, g, t, h, slots in (
        ("llama-3 8B, 8 rows, 32k", 8, 8, 4, 1, 128, 32768),
        ("llama-2 7B, 1 row, 4k", 1, 32, 1, 1, 128, 4096),
        ("smollm2, tree of 64, 8k", 1, 3, 3, 64, 64, 8192),
    ):
        for bits in (2, 4, 8):
            yield Case(
                config=f"{name}, {bits} bits", operations=4 * b * k * g * t * slots * h,
                function=functools.partial(
                    kivi_attention, key_bits=bits, value_bits=bits, scale=h**-0.5
                ),
                args=(
                    array(b, k, g, t, h), packed_shapes(b, k, slots, h, bits, 2),
                    packed_shapes(b, k, slots, h, bits, 3), array(b, 1, t, slots, dtype="bool"),
                ),
            )  # fmt: skip


def problem(rng: Rng, quick: bool) -> Problem:
    q, dtype, (b, k, _, t, h) = queries(rng, quick, sizes=(64, 128))
    s = some_slots(rng, quick)
    room = -(-s // 128) * 128
    bits = [int(x) for x in rng.choice([2, 4, 8], 2)]
    halves = [
        packed_half(
            rng.normal(size=(b, k, room, h)), bits[i], int(rng.choice([32, 64])), axis=2 + i
        )
        for i in range(2)
    ]
    visible, distance, stop, spec = masks(rng, q.shape, s)
    run = functools.partial(kivi_attention, key_bits=bits[0], value_bits=bits[1], **spec)
    facts = facts_of(q, slots=s, dtype=dtype, bits=bits)
    args = (q, *halves, visible, distance, stop, extra_keys(rng, q, dtype))
    return Problem(run=run, args=args, tolerance=tolerance_of(dtype), facts=facts)


def tuned(quick: bool) -> Iterator[TunedUse]:
    for sizes, bits in itertools.product(tuned_shapes(quick), (2, 4, 8)):
        yield TunedUse(
            kernel="kivi_attention", sizes=sizes | {"bits": bits}, candidates=candidates,
            tolerance=3e-2,
        )  # fmt: skip


CASES = {"kivi_attention": cases}
PROBLEMS = {"kivi_attention": problem}
TUNED = {"kivi_attention": tuned}
