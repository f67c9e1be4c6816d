"""What all kernels share: how they are launched and bounded.

Kernels are written for Pallas' Triton back end and launched by `launch` alone, so that another back
end is one more file per kernel. Its limits (jax 0.10 and 0.11): every array in a kernel has a power
of two of elements along each axis, grids are static with at most 3 axes, index maps cannot read
data. Operands are therefore whole arrays that a kernel slices by index, with masks at the edges.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

load, store = plgpu.load, plgpu.store


def launch(
    kernel: Callable[..., None],
    *args: jax.Array,
    out: Any,
    grid: tuple[int, ...],
    name: str,
    warps: int = 4,
    stages: int = 2,
    interpret: bool = False,
    aliases: dict[int, int] | None = None,
) -> Any:
    """Runs `kernel(*refs_of_args, *refs_of_out)` once per point of `grid`.

    `out` is a tree of `ShapeDtypeStruct`. `aliases` maps an argument's number to that of the
    output that takes over its buffer.
    """
    call = pl.pallas_call(
        kernel,
        out_shape=out,
        grid=grid,
        name=name,
        interpret=interpret,
        input_output_aliases=aliases or {},
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
    )
    with _quiet():
        return call(*args)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # jax 0.11 announces that the Triton back end will be removed; the project pins jax < 0.12.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Triton.*", category=DeprecationWarning)
        yield


def exact_dot(a, b):
    """The product with float32 accumulation; float32 operands are not rounded to TF32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return plgpu.dot(a, b, precision=precision)


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least `n` and `least`."""
    return 1 << (max(n, least) - 1).bit_length()


def dividing_power(n: int, most: int) -> int:
    """The largest power of two that divides `n`, at most `most`."""
    return min(n & -n, most)


def blocks_of(n: int, size: int) -> int:
    """How many blocks of `size` cover `n`."""
    return -(-n // size)


def expect(name: str, x: jax.Array, shape: Sequence[int | None]) -> None:
    """Raises unless `x` has `shape`; None stands for any size."""
    fits = x.ndim == len(shape) and all(
        wanted is None or given == wanted for given, wanted in zip(x.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("_" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{wanted}], got {list(x.shape)}")
