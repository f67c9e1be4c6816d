"""Uses of products of a few rows with floating weights."""

import functools
from collections.abc import Iterator
from typing import get_args

import jax.numpy as jnp

from pallas_kernels.cases import (
    Case,
    Problem,
    Rng,
    TunedUse,
    array,
    some,
    tolerance_of,
)
from pallas_kernels.skinny_matmul import feed_forward_hidden, skinny_matmul
from pallas_kernels.skinny_matmul.api import Axis
from pallas_kernels.skinny_matmul.configs import candidates
from pallas_kernels.weight_matmul.cases import product_sizes


def cases() -> Iterator[Case]:
    for model, width, heads, neurons in (
        ("smollm2", 576, (576, 192, 192), 1536),
        ("llama-2 7B", 4096, (4096,) * 3, 11008),
    ):
        up = array(neurons, width)
        for rows in (1, 16):
            x, form = array(rows, width), f"{rows} row{'s'[: rows > 1]}"
            yield Case(
                config=f"{model} q, k, v, {form}", function=skinny_matmul,
                operations=2 * rows * width * sum(heads),
                args=(x, [array(n, width) for n in heads]),
            )  # fmt: skip
            yield Case(
                config=f"{model} gate and up, {form}", operations=4 * rows * width * neurons,
                function=functools.partial(feed_forward_hidden, activation="silu"),
                args=(x, up, up),
            )  # fmt: skip
            yield Case(
                config=f"{model} down, {form}", function=skinny_matmul,
                args=(array(rows, neurons), [array(width, neurons)]),
                operations=2 * rows * width * neurons,
            )  # fmt: skip


def problem(rng: Rng, quick: bool) -> Problem:
    rows, most = int(rng.choice([1, 1, 4, 16])), 100 if quick else 3000
    inputs, dtype = int(rng.integers(1, most)), rng.choice(["float32", "bfloat16"])
    outputs = [int(n) for n in rng.integers(1, most, 3)]
    args = (
        jnp.asarray(rng.normal(size=(rows, inputs)) / inputs**0.5, dtype),
        [some(rng, dtype, n, inputs) for n in outputs],
        [some(rng, dtype, outputs[0]), None, None],
    )
    facts = {"shape": [rows, inputs, *outputs], "dtype": str(dtype)}
    return Problem(run=skinny_matmul, args=args, tolerance=tolerance_of(dtype), facts=facts)


def live_problem(rng: Rng, quick: bool) -> Problem:
    """Parts of outputs, or of inputs, of which some are read."""
    rows, most = int(rng.choice([1, 4])), 12 if quick else 128
    parts, axis = int(rng.integers(1, 9)), get_args(Axis)[int(rng.integers(2))]
    inputs, outputs = (parts * int(n) for n in rng.integers(1, most, 2))
    dtype = rng.choice(["float32", "bfloat16"])
    args = (
        jnp.asarray(rng.normal(size=(rows, inputs)) / inputs**0.5, dtype),
        [some(rng, dtype, outputs, inputs)], [some(rng, dtype, outputs)],
        jnp.asarray(rng.random(parts) < 0.5),
    )  # fmt: skip

    def run(x, weights, biases, live, **options):
        return skinny_matmul(x, weights, biases, live=[live], parts=axis, **options)

    facts = {"shape": [rows, inputs, outputs], "parts": [axis, parts], "dtype": str(dtype)}
    return Problem(run=run, args=args, tolerance=tolerance_of(dtype), facts=facts)


def hidden_problem(rng: Rng, quick: bool) -> Problem:
    rows, most = int(rng.choice([1, 1, 4, 16])), 100 if quick else 3000
    d, f = (int(n) for n in rng.integers(1, most, 2))
    dtype = rng.choice(["float32", "bfloat16"])
    kind = str(rng.choice(["silu", "gelu", "gelu_tanh", "relu"]))
    x = jnp.asarray(rng.normal(size=(rows, d)) / d**0.5, dtype)
    gate = some(rng, dtype, f, d) if rng.random() < 0.5 else None
    args = (x, some(rng, dtype, f, d), gate)
    facts = {"shape": [rows, d, f], "activation": kind, "dtype": str(dtype)}
    run = functools.partial(feed_forward_hidden, activation=kind)
    return Problem(run=run, args=args, tolerance=tolerance_of(dtype), facts=facts)


def tuned(quick: bool) -> Iterator[TunedUse]:
    for sizes in product_sizes(quick, 16):
        yield TunedUse(kernel="skinny_matmul", sizes=sizes, candidates=candidates, tolerance=3e-2)


CASES = {"skinny_matmul": cases}
PROBLEMS = {
    "skinny_matmul": problem, "skinny_matmul_live": live_problem,
    "feed_forward_hidden": hidden_problem,
}  # fmt: skip
TUNED = {"skinny_matmul": tuned}
