"""Uses of attention over a dense cache, and of the merge of its splits."""

import functools
import math
from collections.abc import Iterator

import jax.numpy as jnp

from pallas_kernels.cases import (
    Case,
    Problem,
    Rng,
    TunedUse,
    array,
    extra_keys,
    facts_of,
    masks,
    queries,
    some,
    some_slots,
    tolerance_of,
    tuned_shapes,
)
from pallas_kernels.dense_attention import dense_attention, key_weights
from pallas_kernels.dense_attention.configs import candidates, weight_candidates
from pallas_kernels.softmax_state import ExtraKeys


def cases() -> Iterator[Case]:
    for name, b, k, g, t, h, slots in (
        ("llama-3 8B, 8 rows, 8k", 8, 8, 4, 1, 128, 8192),
        ("llama-2 7B, 1 row, 4k", 1, 32, 1, 1, 128, 4096),
        ("smollm2, tree of 64, 8k", 1, 3, 3, 64, 64, 8192),
    ):
        q, keys, visible = array(b, k, g, t, h), array(b, k, slots, h), (b, 1, t, slots)
        lse, operations = array(b, k, g, t, dtype="float32"), 2 * b * k * g * t * slots * h
        yield Case(
            config=name, operations=2 * operations,
            function=functools.partial(dense_attention, scale=h**-0.5),
            args=(q, keys, keys, array(*visible, dtype="bool")),
        )  # fmt: skip
        yield Case(
            launch="key_weights", config=name, operations=operations,
            function=functools.partial(key_weights, scale=h**-0.5),
            args=(q, keys, array(*visible, dtype="bool"), lse),
        )  # fmt: skip


def merge_cases() -> Iterator[Case]:
    from pallas_kernels.merge_splits import attend_splits, merge_splits  # the kernel language

    for name, b, k, splits, rows, h in (
        ("smollm2, 1 row, 32k", 1, 3, 88, 3, 64),
        ("llama-2 7B, 1 row, 4k", 1, 32, 9, 1, 128),
    ):
        shape = (b, k, splits, rows)
        state = array(*shape, dtype="float32")
        yield Case(
            config=name, operations=2 * math.prod(shape) * h,
            function=functools.partial(merge_splits, interpret=False),
            args=(array(*shape, h, dtype="float32"), state, state),
        )  # fmt: skip
        rest = ExtraKeys(array(b, k, rows, 1, 1, dtype="float32"), array(b, k, 1, h))
        yield Case(
            config=name + ", to the output", operations=2 * math.prod(shape) * h,
            function=functools.partial(attend_splits, dtype=jnp.bfloat16, interpret=False),
            args=(array(*shape, h, dtype="float32"), state, state, rest),
        )  # fmt: skip


def problem(rng: Rng, quick: bool) -> Problem:
    q, dtype, (b, k, _, t, h) = queries(rng, quick, sizes=(64, 80, 128))
    s = some_slots(rng, quick)
    keys, values = some(rng, dtype, b, k, s, h), some(rng, dtype, b, k, s, h)
    visible, distance, stop, spec = masks(rng, q.shape, s)
    run = functools.partial(dense_attention, **spec)
    rest = extra_keys(rng, q, dtype)
    facts = facts_of(q, slots=s, dtype=dtype, extra=rest is not None)
    args = (q, keys, values, visible, distance, stop, rest)
    return Problem(run=run, args=args, tolerance=tolerance_of(dtype), facts=facts)


def weights_problem(rng: Rng, quick: bool) -> Problem:
    q, dtype, (b, k, g, t, h) = queries(rng, quick, sizes=(64, 128))
    s = some_slots(rng, quick)
    visible, distance, stop, spec = masks(rng, q.shape, s)
    lse = jnp.asarray(rng.normal(size=(b, k, g, t)) + 3, jnp.float32)
    run = functools.partial(key_weights, **spec)
    args = (q, some(rng, dtype, b, k, s, h), visible, lse, distance, stop)
    # a rounded score moves its probability by as much: bfloat16 scores reach 4 and more
    return Problem(
        run=run, args=args, tolerance=tolerance_of(dtype), facts=facts_of(q, slots=s, dtype=dtype)
    )


def tuned(quick: bool) -> Iterator[TunedUse]:
    for sizes in tuned_shapes(quick):
        yield TunedUse(
            kernel="dense_attention",
            sizes=sizes | {"bits": None},
            candidates=candidates,
            tolerance=3e-2,
        )


def tuned_weights(quick: bool) -> Iterator[TunedUse]:
    for sizes in tuned_shapes(quick):
        yield TunedUse(
            kernel="key_weights", sizes=sizes, candidates=weight_candidates, tolerance=3e-2
        )


CASES = {"dense_attention": cases, "merge_splits": merge_cases}
PROBLEMS = {"dense_attention": problem, "key_weights": weights_problem}
TUNED = {"dense_attention": tuned, "key_weights": tuned_weights}
