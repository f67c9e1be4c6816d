"""What every kernel is put through: interpret mode against the reference, lowering for CUDA, and a
compilation for an H200 that refuses register spills.

In interpret mode outputs begin as NaN, so an entry that a kernel leaves out is seen.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from jaxinfer.inspection.gpu_target import (
    SPILLS_ARE_ERRORS,
    compile_for,
    lower_for_cuda,
    unavailable_reason,
)
from pallas_kernels.softmax_state import NEGATIVE as PEAK
from tests.compilation import as_users_do

NEGATIVE = np.float32(PEAK)


def agree(run: Callable[..., Any], *args: Any, tolerance: float = 1e-5) -> None:
    """`run(*args, implementation=...)` gives the same by reference and by kernel, up to `tolerance`
    times the largest magnitude of each output; integers exactly."""
    wanted, given = (
        jax.jit(lambda *args, name=name: run(*args, implementation=name))(*args)
        for name in ("reference", "interpret")
    )
    for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(given), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = np.asarray(a), np.asarray(b)
        if a.dtype.kind in "iub":
            np.testing.assert_array_equal(b, a)
            continue
        a, b = a.astype(np.float32), b.astype(np.float32)
        empty = a == NEGATIVE  # maxima of queries that see nothing, which would set the scale
        np.testing.assert_array_equal(b[empty], NEGATIVE)
        a, b = np.where(empty, 0, a), np.where(empty, 0, b)
        assert np.isfinite(a).all()
        np.testing.assert_allclose(b, a, rtol=0, atol=tolerance * max(np.abs(a).max(), 1e-30))


def lowers_for_cuda(run: Callable[..., Any], *args: Any, calls: int = 1) -> None:
    """With the default implementation a CUDA program holds `calls` Triton kernels."""
    text = lower_for_cuda(run, *args).as_text()
    assert text.count("xla.gpu.triton") == calls


def compiles_without_spills(run: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The executable for an H200; skips where this machine cannot compile one."""
    if unavailable_reason():
        pytest.skip(unavailable_reason())
    with as_users_do():
        return compile_for(run, *args, compiler_options=SPILLS_ARE_ERRORS, **options)
