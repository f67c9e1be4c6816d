"""The least time that a decode step can take, measured on the machine at hand.

Decode at a small batch moves every weight and every live cache slot once per token, so bytes
divided by the read bandwidth is the floor. `dots_only` is the floor that can be reached: the step's
matrix products alone, same shapes and threads, each waiting for the one before, without attention,
sampling or caches. A block of another kind than a dense one (`jaxinfer.nn.mlp.FeedForward`) runs
itself, at the cost that it expects.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfer.config import ModelConfig
from jaxinfer.models.mixers import mixer_of
from jaxinfer.models.projections import output, project
from jaxinfer.nn.heads import chosen
from jaxinfer.nn.linear import product
from jaxinfer.nn.mlp import FeedForward
from jaxinfer.runtime.backend import Backend
from jaxinfer.runtime.program import Program
from jaxinfer.typing import Params


@functools.lru_cache(maxsize=4)
def read_bandwidth(megabytes: int | None = None) -> float:
    """Bytes per second that a program reads from this machine's first device; once per process.

    The best of a few passes of two reading programs (a sum, and a vector times a matrix) over an
    array larger than any cache: 256 MB on a CPU, 2 GB on a GPU.
    """
    on_cpu = jax.default_backend() == "cpu"
    size = (megabytes or (256 if on_cpu else 2048)) * 1_000_000
    rows = 1024
    data = jnp.ones((rows, size // 4 // rows), jnp.float32)
    vector = jnp.ones((rows,), jnp.float32)
    programs = (jax.jit(lambda x, _: jnp.sum(x)), jax.jit(lambda x, y: y @ x))
    best = min(
        seconds
        for program in programs
        for seconds in timings(lambda p=program: p(data, vector), repeats=4, budget_s=0.1)
    )
    return data.size * 4 / best


def floor_seconds(size: int | float, bandwidth: float | None = None) -> float:
    """Seconds to read `size` bytes at `bandwidth` (default: this machine's, measured)."""
    bandwidth = read_bandwidth() if bandwidth is None else bandwidth
    if bandwidth <= 0:
        raise ValueError(f"bandwidth must be positive bytes per second, got {bandwidth}")
    return size / bandwidth


def dots_only(
    cfg: ModelConfig, params: Params, batch: int = 1, tokens: int = 1, repeats: int = 5
) -> float:
    """Milliseconds per step of the matrix products of one decode step; the median of `repeats`."""
    x = jnp.ones((batch, tokens, cfg.hidden_size), params["embed"]["tokens"].dtype)
    program = Program(products, static_argnames=("cfg", "backend"))
    typical = _with_typical_blocks(params, batch * tokens)
    backend = Backend.of()

    def run(steps: int) -> float:
        return timings(lambda: program(cfg, typical, x, jnp.int32(steps), backend), repeats=1)[0]

    run(1)
    steps = max(1, min(1000, round(0.1 / max(run(1), 1e-6))))  # 0.1 s hides the call's own cost
    return 1e3 * statistics.median(run(steps) / steps for _ in range(repeats))


def products(
    cfg: ModelConfig,
    params: Params,
    x: Float[Array, "B T D"],
    steps: Int[Array, ""],
    backend: Backend | None = None,
) -> Float[Array, "B T D"]:
    """`steps` times all weights of all layers and the head, each feeding the next; `backend` is for
    blocks that are not dense."""

    def step(_: Array, x: Array) -> Array:
        sites = [x]
        for layer in params["layers"]:
            name, _mixer = mixer_of(layer)
            sites.append(x)
            part = layer[name]
            if name == "attn" and "heads" in part:
                x = _selected_attention(cfg, part, x, sites, backend)
            else:
                x = _attention(part, x) if name == "attn" else _others(part, x)
            sites.append(x)
            x = _feed_forward(cfg, layer["mlp"], x, sites, backend)
        head = params["embed"]["tokens"] if cfg.tie_embeddings else params["head"]["weight"]
        logits = product(x, head, jnp.float32)
        return rescaled(x + _trace_of(logits).astype(x.dtype))

    return jax.lax.fori_loop(0, steps, step, x)


def _with_typical_blocks(params: Params, rows: int) -> Params:
    def one(layer: Params) -> Params:
        attention = layer.get("attn", {})
        if "heads" in attention:
            attention = attention | {"heads": attention["heads"].typical(rows)}
            layer = layer | {"attn": attention}
        block = layer["mlp"]
        return layer | {"mlp": block.typical(rows) if isinstance(block, FeedForward) else block}

    return params | {"layers": tuple(map(one, params["layers"]))}


def _attention(part: Params, x: Array) -> Array:
    q, k, v = (product(x, part[n]["weight"]) for n in ("q", "k", "v"))
    mixed = rescaled(q) + (_trace_of(k) + _trace_of(v)).astype(x.dtype)
    return rescaled(x + product(mixed, part["out"]["weight"]))


def _selected_attention(
    cfg: ModelConfig, part: Params, x: Array, sites: list[Array], backend: Backend | None
) -> Array:
    heads = chosen(part, x, sites, backend, is_prompt=False)
    listing = None if heads is None else heads.listing
    later = listing if part["heads"].keys == "deferred" else None
    (q,) = project(cfg, part, x, backend, names="q", listing=listing)
    k, v = project(cfg, part, x, backend, names="kv", listing=later)
    more = jnp.mean(k.astype(jnp.float32)) + jnp.mean(v.astype(jnp.float32))
    mixed = rescaled(q) + (1e-3 * more).astype(x.dtype)
    return rescaled(x + output(part, mixed, backend, heads))


def _feed_forward(
    cfg: ModelConfig,
    part: Params | FeedForward,
    x: Array,
    sites: list[Array],
    backend: Backend | None,
) -> Array:
    if isinstance(part, FeedForward):
        return rescaled(x + part(cfg, x, sites, backend))
    inner = product(x, part["up"]["weight"])
    if "gate" in part:
        inner = inner * product(x, part["gate"]["weight"])
    return rescaled(x + product(rescaled(inner), part["down"]["weight"]))


def _others(part: Params, x: Array) -> Array:
    """The weights of another mixer, one after another."""
    for path, weight in jax.tree_util.tree_leaves_with_path(part):
        if getattr(path[-1], "key", None) == "weight" and weight.ndim == 2:
            y = product(jnp.resize(x, (*x.shape[:-1], weight.shape[1])), weight)
            x = rescaled(x + _trace_of(y).astype(x.dtype))
    return x


def rescaled(x: Array) -> Array:
    """Unit mean square: without it the numbers run into infinities or slow denormals."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-6)).astype(x.dtype)


def _trace_of(x: Array) -> Array:
    """A small number that needs every entry of `x`, so that its product is not left out."""
    return 1e-3 * jnp.mean(x.astype(jnp.float32), axis=-1, keepdims=True)


def timings(
    run: Callable[[], Any], *, repeats: int = 5, budget_s: float | None = None
) -> list[float]:
    """Seconds of each run after one that is not counted; stops early when the budget is spent."""
    jax.block_until_ready(run())
    found: list[float] = []
    while len(found) < repeats and (not found or budget_s is None or sum(found) < budget_s):
        start = time.perf_counter()
        jax.block_until_ready(run())
        found.append(time.perf_counter() - start)
    return found
