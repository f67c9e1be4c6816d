"""Kernels against their references, in float32 at the highest precision, on random problems.

The problems are those of `pallas_kernels.cases`. An error is the largest difference over the
largest magnitude of each output.
"""

import functools
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.cases import FOLDERS, Problem
from pallas_kernels.dispatch import Implementation
from pallas_kernels.softmax_state import NEGATIVE


@dataclass(frozen=True, kw_only=True)
class Result:
    """How far a kernel was from its reference. `kernel` is its folder, `problem` the operation and
    the number of the draw; `error` is infinite where the kernel did not compile or run, which
    `message` then tells."""

    kernel: str
    problem: str
    error: float
    tolerance: float
    message: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # not so for NaN


def problems() -> Iterator[tuple[str, str]]:
    """(kernel, operation) of all kernels."""
    for kernel in FOLDERS:
        for operation in _problems(kernel):
            yield kernel, operation


def check(
    kernel: str, operation: str, seed: int, *, implementation: Implementation, quick: bool
) -> Result:
    """One problem put to one kernel; an exception is a result too. `quick` draws smaller shapes."""
    tolerance, message = 0.0, ""
    try:
        number = list(problems()).index((kernel, operation))
        problem = _problems(kernel)[operation](np.random.default_rng([seed, number]), quick)
        tolerance, error = problem.tolerance, error_in(problem, implementation)
    except Exception as failure:  # whatever a compiler or a driver raises: the kernel is no good
        error, message = float("inf"), f"{type(failure).__name__}: {failure}"
    name = f"{operation} {seed}"
    return Result(kernel=kernel, problem=name, error=error, tolerance=tolerance, message=message)


def error_in(problem: Problem, implementation: Implementation) -> float:
    """The error of a kernel on a problem."""
    found = jax.jit(functools.partial(problem.run, implementation=implementation))(*problem.args)
    with jax.default_matmul_precision("highest"):
        exact = wide(problem.args) if problem.widens else problem.args
        wanted = jax.jit(functools.partial(problem.run, implementation="reference"))(*exact)
    return error_of(found, wanted)


def error_of(found: Any, wanted: Any) -> float:
    """The largest error of any output relative to its magnitude; NaN if one is not finite, and
    infinite where an integer or an empty maximum differs."""
    worst = 0.0
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        if b.dtype.kind in "iub":
            worst = max(worst, 0.0 if (a == b).all() else np.inf)
            continue
        a, b = a.astype(np.float64), b.astype(np.float64)
        empty = b == np.float32(NEGATIVE)  # maxima of queries that see nothing
        if (a[empty] != b[empty]).any():
            return np.inf
        a, b = np.where(empty, 0, a), np.where(empty, 0, b)
        error = np.abs(a - b).max(initial=0) / max(np.abs(b).max(initial=0), 1e-30)
        if not np.isfinite(error):
            return float("nan")
        worst = max(worst, float(error))
    return worst


def wide(tree: Any) -> Any:
    """Floats as float32: what a bfloat16 kernel computes, without its roundings."""
    return jax.tree.map(
        lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def _problems(kernel: str) -> dict[str, Any]:
    return importlib.import_module(f"pallas_kernels.{kernel}.cases").PROBLEMS
