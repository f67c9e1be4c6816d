"""The machine: device, driver, versions, and the rate of a large copy."""

import functools
import subprocess
from typing import Any

import jax
import jax.numpy as jnp

from bench.gpu.rows import Run
from bench.gpu.step import Plain
from bench.gpu.timing import filled, memory_limit
from bench.harness import summarise
from jaxinfer.inspection.roofline import read_bandwidth, timings

PASSES = 10
QUERY = "name,driver_version,memory.total,power.limit,clocks.max.memory"


def steps(run: Run) -> list[Plain]:
    return [Plain({"part": "environment"}, functools.partial(describe, run))]


def describe(run: Run) -> dict[str, Any]:
    rate = copy_rates(4_000_000 if run.quick else 4_000_000_000)
    return {
        "device": jax.devices()[0].device_kind,
        "backend": jax.devices()[0].client.platform_version,
        "smi": _smi(),
        "memory_bytes": memory_limit(),
        "copy_gb_per_s": rate["median"],
        "copies_gb_per_s": rate,
        "read_gb_per_s": read_bandwidth(4 if run.quick else 2048) / 1e9,
    }


def copy_rates(size: int) -> dict[str, Any]:
    """GB/s, read and written, of passes over an array of `size` bytes in one program."""
    x = jax.jit(functools.partial(filled, shape=(size // 4,), dtype=jnp.float32))(1)
    program = jax.jit(
        lambda x: jax.lax.fori_loop(0, PASSES, lambda _, x: 1 - x, x), donate_argnums=0
    )

    def once() -> jax.Array:
        nonlocal x
        x = program(x)
        return x

    return summarise([2 * size * PASSES / s / 1e9 for s in timings(once, repeats=7)])


def _smi() -> str | None:
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
