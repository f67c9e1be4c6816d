"""XLA options for tiny programs that run a few times: a quarter of the compile time."""

import functools

import jax

QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
if jax.__version_info__ < (0, 11):  # gone since
    QUICK["xla_cpu_use_fusion_emitters"] = False
quick_jit = functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
