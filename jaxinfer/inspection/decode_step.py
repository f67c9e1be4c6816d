"""What a model with a cache policy costs to decode, read from the compiled program and timed.

`inspect_decode` compiles the very loop that `LM.generate` runs, for this machine or for a GPU that
is described but absent. On this machine it also runs some steps and compares them with the floor:
the same matrix products alone plus the time to read the live cache.
"""

import dataclasses
import functools
import statistics
import time

import jax
import jax.numpy as jnp

from jaxinfer.cache.base import bytes_of
from jaxinfer.cache.policy import Cache, Policy
from jaxinfer.config import ModelConfig
from jaxinfer.decode.engine import Engine, make_requests
from jaxinfer.decode.sampling import Sampler
from jaxinfer.decode.state import DecodeState, Requests
from jaxinfer.inspection import gpu_target, hlo
from jaxinfer.inspection.leaves import felt_leaves
from jaxinfer.inspection.roofline import dots_only, floor_seconds, timings
from jaxinfer.nn.mlp import FeedForward
from jaxinfer.nn.quantized import is_divisor, size_of
from jaxinfer.runtime.backend import Backend
from jaxinfer.runtime.program import Compiled, Program
from jaxinfer.typing import Json, Leaf, Params

TOKEN_BUFFER = 64
TIMED_STEPS = 8


@dataclasses.dataclass(frozen=True)
class DecodeCase:
    """A fresh decode `Program` and abstract arguments for it."""

    engine: Engine
    program: Program
    requests: Requests
    state: DecodeState  # ShapeDtypeStruct leaves
    grown: Cache  # the cache of twice the capacity
    capacity: int

    @property
    def arguments(self) -> tuple:
        steps = jax.ShapeDtypeStruct((), jnp.int32)
        return self.engine.config, self.engine.params, self.requests, self.state, steps

    @property
    def cache_leaves(self) -> list[jax.ShapeDtypeStruct]:
        """The leaves whose copy would be felt, see `jaxinfer.inspection.leaves`."""
        return felt_leaves(self.state.cache, self.grown, self.capacity)


def decode_case(
    cfg: ModelConfig,
    params: Params,
    policy: Policy,
    capacity: int,
    batch: int = 1,
    platform: str | None = None,
    sampler: Sampler | None = None,
) -> DecodeCase:
    """The decode loop as the engine compiles it, for `platform` (default: JAX's).

    `params` may be abstract; their embedding's dtype is the cache's.
    """
    policy = policy.sized(capacity)
    engine = Engine(cfg, params, Backend.of(platform=platform)).serving(policy)
    cache, grown = (
        jax.eval_shape(functools.partial(engine.new_cache, policy, batch, size))
        for size in (capacity, 2 * capacity)
    )
    requests = make_requests(
        [sampler or Sampler()] * batch, [0] * batch, [TOKEN_BUFFER] * batch, (), cfg.vocab_size
    )
    begin = engine.programs["init_state"].function
    logits = jax.ShapeDtypeStruct((batch, cfg.vocab_size), jnp.float32)
    penalty = requests.sampler.features.penalty
    seen = jax.ShapeDtypeStruct((batch, cfg.vocab_size if penalty else 1), jnp.int32)
    state = jax.eval_shape(
        lambda c, x, s: begin(c, x, s, requests, TOKEN_BUFFER), cache, logits, seen
    )
    ours = engine.programs["decode"]
    program = Program(
        ours.function,
        static_argnames=ours.static_argnames,
        donate_argnames=ours.donate_argnames,
        name=ours.name,
    )
    return DecodeCase(engine, program, requests, state, grown, capacity)


def inspect_decode(
    cfg: ModelConfig,
    params: Params,
    policy: Policy,
    capacity: int,
    batch: int = 1,
    target: str | None = None,
    live: int | None = None,
) -> Json:
    """Sizes and compiled structure of decoding, and where it runs here, its time against its floor.

    With `target` (such as "h200") nothing runs: the loop is compiled for that GPU with bfloat16
    parameters, and `step_ms`, `floor_ms` and `floor_share` are None; so they are when `params` are
    abstract. `read_bytes` are those of the parameters that a step is expected to read. `copies`
    names the instructions that `cache_copies` counts, and the leaves; `counted_leaves` are those of
    `jaxinfer.inspection.leaves`. `live` is the number of stored
    tokens in the timed steps (default: half the capacity).
    """
    numbers, policy = size_of(params), policy.sized(capacity)
    if target is not None:
        params = jax.tree.map(_as_bfloat16, params)
    case = decode_case(cfg, params, policy, capacity, batch, None if target is None else "gpu")
    if target is None:
        compiled = case.program.prepare(*case.arguments)
        traces = case.program.traces
    else:
        compiled, traces = _compile_for(case, target), 1
    facts = _structure(case, compiled) | {"traces": traces}
    times = {"floor_ms": None, "step_ms": None, "floor_share": None}
    concrete = not any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params))
    if target is None and concrete:
        live = min(capacity // 2 if live is None else live, max(capacity - TOKEN_BUFFER, 0))
        times = _times(case, policy, capacity, batch, live)
        facts["traces"] = case.program.traces
    cache_bytes = bytes_of(case.state.cache.layers)
    return {
        "parameters": numbers,
        "parameter_bytes": bytes_of(params),
        "read_bytes": step_bytes(cfg, params, 0, batch, case.engine.backend),
        "cache_bytes_per_token": _whole(cache_bytes / (batch * capacity)),
        "cache_bytes": cache_bytes,
        "decode": facts | times,
    }


def step_bytes(
    cfg: ModelConfig,
    params: Params,
    cache_bytes: int = 0,
    rows: int = 1,
    backend: Backend | None = None,
) -> int:
    """Bytes that one decode step of `rows` tokens must read: every parameter but the rows of
    embeddings not used and what sparse blocks and heads leave out on `backend` (default: this
    machine's). What was divided into norms is not counted: of these vectors only selectors read
    any."""
    looked_up = bytes_of(params["embed"])
    if cfg.tie_embeddings:
        looked_up -= bytes_of(params["embed"]["tokens"])
    blocks = [x["mlp"] for x in params["layers"] if isinstance(x["mlp"], FeedForward)]
    left_out = sum(bytes_of(block) - block.read_bytes(rows, backend) for block in blocks)
    attentions = [x["attn"] for x in params["layers"] if "heads" in x.get("attn", {})]
    left_out += sum(bytes_of(x) - x["heads"].read_bytes(x, rows, backend) for x in attentions)
    leaves = jax.tree_util.tree_leaves_with_path(params["layers"])
    left_out += sum(bytes_of(leaf) for path, leaf in leaves if is_divisor(path))
    return bytes_of(params) - looked_up - left_out + cache_bytes


def _structure(case: DecodeCase, compiled: Compiled) -> Json:
    module = hlo.module_of(compiled.executable)
    memory = hlo.memory(compiled.executable)
    leaves = case.cache_leaves
    copies = hlo.cache_sized_copies(module, leaves) if leaves else []
    return {
        "compile_s": compiled.total_s,
        "cache_copies": len(copies),
        "copies": copies,
        "counted_leaves": len(leaves),
        "unaliased_leaves": len(hlo.unaliased_leaves(module, leaves)),
        "temp_bytes": memory.temp_bytes,
        "alias_bytes": memory.alias_bytes,
        "argument_bytes": memory.argument_bytes,
        "fusions": hlo.fusion_count(module),
        "launches": hlo.launch_count(module),
    }


def _compile_for(case: DecodeCase, target: str) -> Compiled:
    start = time.perf_counter()
    executable = gpu_target.compile_for(case.program, *case.arguments, target=target)
    return Compiled(executable, 0.0, time.perf_counter() - start)


def _times(
    case: DecodeCase, policy: Policy, capacity: int, batch: int, live: int
) -> dict[str, float]:
    engine, cfg = case.engine, case.engine.config
    cache = engine.new_cache(policy, batch, capacity)
    cache = dataclasses.replace(cache, length=jnp.full((batch,), live, jnp.int32))
    seen = jnp.zeros(case.state.seen.shape, jnp.int32)
    logits = jnp.zeros((batch, cfg.vocab_size), jnp.float32)
    state = engine.init_state(cache, logits, case.requests, seen, TOKEN_BUFFER)
    steps = jnp.int32(TIMED_STEPS)

    def run() -> Leaf:
        nonlocal state
        state = case.program(cfg, engine.params, case.requests, state, steps)
        return state.steps

    budget = TOKEN_BUFFER // TIMED_STEPS - 2
    step_s = statistics.median(timings(run, repeats=budget, budget_s=1.5)) / TIMED_STEPS
    live_bytes = bytes_of(case.state.cache.layers) * live / capacity
    floor_s = dots_only(cfg, engine.params, batch) / 1e3 + floor_seconds(int(live_bytes))
    return {"floor_ms": 1e3 * floor_s, "step_ms": 1e3 * step_s, "floor_share": floor_s / step_s}


def _as_bfloat16(leaf: Leaf) -> jax.ShapeDtypeStruct:
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    return jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16 if floating else leaf.dtype)


def _whole(x: float) -> int | float:
    return int(x) if x == int(x) else x
