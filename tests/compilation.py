"""How tests compile: quickly, or as users do.

The suite compiles some ten thousand programs that run once or twice, so that nearly all of its time
is XLA's. Without LLVM's optimizations, without the fusion emitters and in one piece a program takes
a third of the time. `XLA_FLAGS` are read once in a process; the rest is set for each test.
"""

import contextlib
from collections.abc import Iterator

import jax

FLAGS = "--xla_cpu_parallel_codegen_split_count=1"  # in one piece
# The options of a user, as overrides of those of the tests.
AS_USERS_DO = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_cpu_parallel_codegen_split_count": 32,
}
if jax.__version_info__ < (0, 11):  # gone since
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
    AS_USERS_DO["xla_cpu_use_fusion_emitters"] = True


def quickly(quick: bool) -> None:
    """Every compilation from here on is quick, or each `Program` as users compile it."""
    from jaxinfer.runtime.program import Program

    jax.config.update("jax_disable_most_optimizations", quick)
    Program.compiler_options = {} if quick else AS_USERS_DO


@contextlib.contextmanager
def as_users_do() -> Iterator[None]:
    before = jax.config.read("jax_disable_most_optimizations")
    quickly(False)
    try:
        yield
    finally:
        quickly(before)
