"""Every kernel on random problems against its reference, see `pallas_kernels.checks`.

Shapes are ragged and heads grouped, inputs are drawn anew for every check.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.gpu.rows import Run
from bench.gpu.timing import filled, memory_limit
from pallas_kernels.cases import Problem, every
from pallas_kernels.checks import error_of, wide
from pallas_kernels.dense_attention import dense_attention
from pallas_kernels.kivi_attention import PackedHalf, kivi_attention

SEEDS = 8
PROBLEMS = every("PROBLEMS")


@dataclass(kw_only=True)
class Check:
    """A step that compares a kernel with its reference on one problem."""

    config: dict[str, Any]
    suite: Run
    make: Callable[[np.random.Generator, bool], Problem]
    problem: Any = None
    programs: Any = ()

    def prepare(self) -> None:
        kernel_number = list(PROBLEMS).index(self.config["op"])
        rng = np.random.default_rng([self.suite.seed, self.config["seed"], kernel_number])
        self.problem = self.make(rng, self.suite.quick)
        run, args = self.problem.run, self.problem.args

        def kernel(*args):
            return run(*args, implementation=self.suite.kernel)

        def reference(*args):
            with jax.default_matmul_precision("highest"):
                return run(*args, implementation="reference")

        exact = wide(args) if self.problem.widens else args
        self.programs = [
            jax.jit(f).lower(*x).compile() for f, x in ((kernel, args), (reference, exact))
        ]

    def run(self) -> dict[str, Any]:
        problem = self.problem
        exact = wide(problem.args) if problem.widens else problem.args
        found, wanted = self.programs[0](*problem.args), self.programs[1](*exact)
        error = error_of(found, wanted)
        return problem.facts | {
            "largest_error": error,
            "tolerance": problem.tolerance,
            "agrees": error <= problem.tolerance,  # not so for NaN
        }

    def drop(self) -> None:
        self.problem, self.programs = None, ()


@dataclass(kw_only=True)
class FarRow:
    """A step that compares the last row of a batch of more than 2**31 numbers with that row alone:
    offsets of 32 bits would go wrong there."""

    config: dict[str, Any]
    suite: Run
    bits: int | None

    def prepare(self) -> dict[str, Any] | None:
        heads, slots, width = (2, 256, 64) if self.suite.quick else (32, 131072, 128)
        per_number = 1 if self.bits is None else 32 // self.bits
        rows = 2 if self.suite.quick else 4 * per_number + 1
        size = (
            2.0 * rows * heads * slots * width * (2 if self.bits is None else self.bits / 8 + 1 / 8)
        )
        room = memory_limit()
        if room is not None and size > 0.85 * room:
            return {"skipped": f"{size / 1e9:.0f} GB do not fit"}
        self.shape = rows, heads, slots, width
        return None

    def run(self) -> dict[str, Any]:
        rows, heads, slots, width = self.shape
        q = jax.jit(lambda: filled(1, (rows, heads, 1, 1, width), jnp.bfloat16))()
        cache = jax.jit(lambda: stored(self.shape, self.bits))()
        jitted = jax.jit(
            lambda q, *cache: attention(q, *cache, bits=self.bits, name=self.suite.kernel)
        )
        alone = jax.tree.map(lambda x: x[-1:], (q, *cache))
        error = error_of(jax.tree.map(lambda x: x[-1:], jitted(q, *cache)), jitted(*alone))
        return {"largest_error": error, "tolerance": 1e-2, "agrees": error <= 1e-2,
                "numbers": rows * heads * slots * width}  # fmt: skip

    def drop(self) -> None:
        pass


def steps(run: Run) -> list[Any]:
    seeds = range(1 if run.quick else SEEDS)
    common = {"part": "correctness"}
    checks: list[Any] = [
        Check(config=common | {"op": name, "seed": seed}, suite=run, make=make)
        for seed in seeds
        for name, make in PROBLEMS.items()
    ]
    for name, bits in (("dense_attention", None), ("kivi_attention", 8)):
        config = common | {"op": name, "seed": "beyond 2**31 numbers"}
        checks.append(FarRow(config=config, suite=run, bits=bits))
    return checks


def stored(
    shape: tuple[int, ...], bits: int | None, group: int = 32, seed: Any = 0
) -> tuple[Any, Any]:
    """Keys and values of [B, K, S, H] in bfloat16 or in codes."""
    b, k, s, h = shape
    if bits is None:
        return filled(seed + 2, shape, jnp.bfloat16), filled(seed + 3, shape, jnp.bfloat16)
    count = 32 // bits
    step = 2.0 / (2**bits - 1)

    def half(seed: Any, words: tuple[int, int], groups: tuple[int, int]) -> PackedHalf:
        scale = jnp.abs(filled(seed + 1, (b, k, *groups), jnp.float16, step)) + jnp.float16(
            step / 8
        )
        zero = filled(seed + 2, (b, k, *groups), jnp.float16)
        return PackedHalf(filled(seed, (b, k, *words), jnp.uint32), scale, zero)

    keys = half(seed + 2, (s // count, h), (s // group, h))
    return keys, half(seed + 5, (s, h // count), (s, h // group))


def attention(
    q: Any, keys: Any, values: Any, *, bits: int | None, name: Any, config: Any = None
) -> Any:
    """Of every query over all that `stored` makes."""
    slots = (values.words if bits else values).shape[2]
    visible = jnp.ones((1, 1, 1, slots), bool)
    scale = float(q.shape[-1] ** -0.5)
    run = dense_attention
    if bits is not None:
        run = functools.partial(kivi_attention, key_bits=bits, value_bits=bits)
    return run(q, keys, values, visible, scale=scale, config=config, implementation=name)
