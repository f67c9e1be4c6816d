"""What the tests of CPU kernels share: the instruction sets to run, and whether there are any."""

import contextlib
from collections.abc import Iterator

import pytest

from jaxinfer.cpu_kernels import loading

SETS = ("avx512_vnni", "avx2_vnni", "avx2", "neon_dot", "portable")
needs_kernels = pytest.mark.skipif(
    not loading.available(), reason=f"no CPU kernels: {loading.state().reason}"
)
every_set = pytest.mark.parametrize(
    "instructions",
    [
        pytest.param(name, marks=pytest.mark.skipif(name not in loading.instruction_sets(),
                                                    reason="this CPU has no such instructions"))
        for name in SETS
    ],
)  # fmt: skip


@contextlib.contextmanager
def computing(instructions: str | None = None, threads: int = 0) -> Iterator[None]:
    """Kernels of an instruction set, and at most so many threads, in this block."""
    before = loading.instruction_sets()[0]
    try:
        loading.choose(instructions or before)
        loading.limit_threads(threads)
        yield
    finally:
        loading.choose(before)
        loading.limit_threads(0)
