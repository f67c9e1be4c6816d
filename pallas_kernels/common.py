"""What all kernels share: how they are launched and bounded.

Kernels are written for Pallas' Triton back end and launched by `launch` alone, so that another back
end is one more file per kernel. Its limits (jax 0.10 and 0.11): every array in a kernel has a power
of two of elements along each axis, grids are static with at most 3 axes, index maps cannot read
data. Operands are therefore whole arrays that a kernel slices by index, with masks at the edges.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
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
