"""Norms by the kernel (interpreted) are those that XLA computes, in every form of block."""

import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.cache.presets import full
from jaxinfer.config import ModelConfig, RopeConfig
from jaxinfer.models import stack
from jaxinfer.models.params import init_params
from jaxinfer.models.stack import init_cache
from jaxinfer.runtime.backend import Backend
from jaxinfer.testing.quick import quick_jit

CFG = ModelConfig(
    family="llama", vocab_size=61, hidden_size=40, intermediate_size=48, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=16, max_positions=64, rope=RopeConfig(rotary_dim=16),
)  # fmt: skip
forward = quick_jit(stack.forward)
FORMS = {
    "sequential": CFG,
    "layer norms": replace(CFG, norm="layer"),
    "parallel": replace(CFG, parallel_block=True, norm="layer"),
    "parallel, one norm": replace(CFG, parallel_block=True, shared_norm=True),
}


@pytest.mark.parametrize("cfg", FORMS.values(), ids=FORMS)
def test_logits_with_the_kernel_are_those_without(cfg):
    params = init_params(cfg, jax.random.key(0))
    tokens = jnp.arange(14, dtype=jnp.int32).reshape(2, 7) * 4
    found = [
        forward(
            cfg, params, tokens, init_cache(cfg, params, full(), 2, 16, backend=Backend.of(name))
        )
        for name in (None, "interpret")
    ]
    wanted = forward(cfg, params, tokens)
    scale = np.abs(wanted.logits).max()
    for one in found:
        np.testing.assert_allclose(one.logits, wanted.logits, atol=1e-5 * scale)


ON_A_CPU = """
import sys
import jax, jax.numpy as jnp
from jaxinfer.cache.presets import full
from jaxinfer.models.stack import forward, init_cache
from tests.nn.test_norm import CFG, init_params

params, tokens = init_params(CFG, jax.random.key(0)), jnp.zeros((1, 1), jnp.int32)
cache = init_cache(CFG, params, full(), 1, 16)
jax.jit(forward, static_argnums=0).lower(CFG, params, tokens, cache)
languages = ("jax.experimental.pallas", "pallas_kernels.common")
assert not [name for name in sys.modules if name.startswith(languages)]
"""


def test_a_cpu_imports_no_kernel_language_to_normalise():
    done = subprocess.run([sys.executable, "-c", ON_A_CPU], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
