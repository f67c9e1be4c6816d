"""Whole decode steps through the library's own decode program, with random weights.

Caches are not prefilled: an empty one gets the length of a long text, so that every step reads all
of its slots. Nothing in a step but the sampled tokens depends on what they hold. The floor is the
bytes of weights and live cache over the rate of a large copy.
"""

import dataclasses
import statistics
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from bench.gpu.profile import profiled
from bench.gpu.rows import Run, copy_bandwidth
from bench.gpu.step import Plain
from bench.gpu.timing import filled, memory_limit
from jaxinfer.cache.base import bytes_of
from jaxinfer.cache.policy import Policy
from jaxinfer.cache.presets import full, h2o, kivi, streaming
from jaxinfer.config import ModelConfig, RopeConfig
from jaxinfer.decode.engine import Engine, make_requests
from jaxinfer.decode.sampling import Sampler
from jaxinfer.hyena_config import FilterConfig, HyenaConfig
from jaxinfer.inspection.decode_step import step_bytes
from jaxinfer.inspection.roofline import timings
from jaxinfer.models.params import abstract_params
from jaxinfer.models.quantize import quantize_weights
from jaxinfer.models.stack import cache_bytes_per_row, cache_geometry, init_cache
from jaxinfer.runtime.backend import Backend

TOKEN_BUFFER = 64
ROOM = 128  # slots behind the text, for the tokens of the timed steps
STEPS = 16
H2O_SHARE = 0.1  # of the context, for heavy hitters and for recent tokens
MARGIN = 0.95  # of what the process may have; the rest is for what a step needs in between


def llama(layers: int, d: int, heads: int, kv: int, f: int, vocab: int, tied: bool):
    return ModelConfig(
        family="llama", vocab_size=vocab, hidden_size=d, intermediate_size=f, num_layers=layers,
        num_heads=heads, num_kv_heads=kv, head_dim=d // heads, max_positions=1 << 18,
        rope=RopeConfig(theta=10000.0, rotary_dim=d // heads), tie_embeddings=tied,
    )  # fmt: skip


MODELS = {
    "smollm2-135m": llama(30, 576, 9, 3, 1536, 49152, True),
    "llama-2-7b": llama(32, 4096, 32, 32, 11008, 32000, False),
}


def hyena(layers: int, d: int, f: int, vocab: int, positions: int, filters: FilterConfig):
    """The shape of the published Hyena models (arXiv 2302.10866, table A.4)."""
    return ModelConfig(
        family="hyena", vocab_size=vocab, hidden_size=d, intermediate_size=f, num_layers=layers,
        num_heads=d // 64, num_kv_heads=d // 64, head_dim=64, max_positions=positions, norm="layer",
        norm_bias=True, activation="gelu_tanh", gated_mlp=False, mlp_bias=True, positions="none",
        tie_embeddings=True, mixers=("hyena",) * layers, hyena=HyenaConfig(filter=filters),
    )  # fmt: skip


LONGEST = 1024  # prompts of 512, as in Laughing Hyena's figures, and room behind them
MODAL, EXPLICIT = FilterConfig(kind="modal", modes=16), FilterConfig(kind="explicit")
RECURRENT = {
    "gpt-1.3b": llama(24, 2048, 16, 16, 5504, 50264, True),
    "hyena-1.3b, 16 modes": hyena(36, 2048, 4096, 50264, LONGEST, MODAL),
    "hyena-1.3b, exact": hyena(36, 2048, 4096, 50264, LONGEST, EXPLICIT),
}
"""Random weights of the shapes that Laughing Hyena (arXiv 2310.18780) compares."""

RECURRENT_SHAPES = tuple((LONGEST, batch) for batch in (1, 64, 256, 1024))
TINY_RECURRENT = {"tiny hyena": hyena(1, 128, 256, 512, 512, MODAL)}
TINY = {"tiny": llama(2, 128, 4, 2, 256, 512, True)}
SHAPES = ((32768, 1), (32768, 4), (32768, 8), (4096, 1), (131072, 1), (4096, 8), (131072, 8))
TINY_SHAPES = ((512, 2),)
_params: dict[Any, Any] = {}
_programs: dict[Any, Any] = {}  # a window's steps are the same program at any context


@dataclass(kw_only=True)
class Decode:
    """A step that times decode steps of one model, policy, context and batch."""

    config: dict[str, Any]
    suite: Run
    model: ModelConfig
    policy: Policy
    backend: Backend
    programs: Any = None

    @property
    def kept(self) -> str:
        """The form of the weights."""
        return self.config.get("weights", "bfloat16")

    def prepare(self) -> dict[str, Any] | None:
        batch, context = self.config["batch"], self.config["context"]
        self.sized = self.policy.sized(context)
        params = shapes_of(self.model, self.kept, self.backend)
        abstract = jax.eval_shape(
            lambda: init_cache(
                self.model, params, self.sized, batch, context, "bfloat16", self.backend
            )
        )
        self.cache_bytes = bytes_of(abstract.layers)
        self.weight_bytes = bytes_of(params)
        room, need = memory_limit(), self.cache_bytes + self.weight_bytes
        if room is not None and need > MARGIN * room:
            return {"skipped": f"weights and cache of {need / 1e9:.0f} GB do not fit into "
                    f"{room / 1e9:.0f} GB", "bytes": need}  # fmt: skip
        shapes = tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves((abstract, params)))
        key = (self.model, self.sized, self.backend, shapes)
        fresh = Engine(self.model, params, self.backend).programs
        self.programs = _programs.setdefault(key, fresh)
        self.requests = make_requests(
            [Sampler()] * batch, [0] * batch, [1 << 20] * batch, (), self.model.vocab_size
        )
        logits = jax.ShapeDtypeStruct((batch, self.model.vocab_size), jnp.float32)
        seen = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
        begin = self.programs["init_state"].function
        state = jax.eval_shape(
            lambda *args: begin(*args, self.requests, TOKEN_BUFFER), abstract, logits, seen
        )
        self.programs["decode"].prepare(
            self.model, params, self.requests, state, jax.ShapeDtypeStruct((), jnp.int32)
        )
        return None

    def run(self) -> dict[str, Any]:
        batch, context = self.config["batch"], self.config["context"]
        shapes = shapes_of(self.model, self.kept, self.backend)
        params = weights((self.config["model"], self.kept), shapes, self.suite.seed)
        engine = dataclasses.replace(
            Engine(self.model, params, self.backend), programs=self.programs
        )
        length = jnp.full((batch,), context - ROOM, jnp.int32)
        cache = dataclasses.replace(engine.new_cache(self.sized, batch, context), length=length)
        logits = jnp.zeros((batch, self.model.vocab_size), jnp.float32)
        seen = jnp.zeros((batch, 1), jnp.int32)
        state = engine.init_state(cache, logits, self.requests, seen, TOKEN_BUFFER)
        del cache
        count = jnp.int32(STEPS)

        def some_steps() -> Any:
            nonlocal state
            program = self.programs["decode"]
            state = program(self.model, params, self.requests, state, count)
            return state.steps

        repeats = ROOM // STEPS - 2  # beside the first, which is not timed, and the profiled one
        seconds = [t / STEPS for t in timings(some_steps, repeats=repeats, budget_s=0.7)]
        step = statistics.median(seconds)
        copy = copy_bandwidth(self.suite.out)
        read = step_bytes(self.model, params, self.cache_bytes, batch, self.backend)
        floor = read / copy if copy else None
        return {
            "ms_per_token": 1e3 * step,
            "ms_range": [1e3 * min(seconds), 1e3 * max(seconds)],
            "tokens_per_s": batch / step,
            "cache_bytes": self.cache_bytes,
            "weight_bytes": self.weight_bytes,
            "floor_ms": 1e3 * floor if floor else None,
            "floor_share": floor / step if floor else None,
            "compile_s": self.programs["decode"].compile_s,
            **profiled(some_steps, STEPS),
        }

    def drop(self) -> None:
        self.programs = None


def steps(run: Run) -> list[Any]:
    """What memory allows, then the steps, last what XLA makes of a few without our kernels."""
    models = TINY if run.quick else MODELS
    shapes = TINY_SHAPES if run.quick else SHAPES
    implementation = "interpret" if run.interpret else None
    common = {"part": "decode"}
    made: list[Any] = [
        Plain(common | {"op": "largest batch", "model": name}, lambda m=model: largest_batch(m))
        for name, model in models.items()
    ]
    cases = [
        (name, context, batch, policy, "kernel", implementation, {})
        for context, batch in shapes
        for name in models
        for policy in policies()
    ]
    context, batch = shapes[0]
    first = [(name, policy) for name in models for policy in ("full", "kivi 2 bits")]
    int4, end = {"weights": "int4"}, len(models) * len(policies())
    cases[end:end] = [
        (name, context, batch, policy, "kernel", implementation, int4) for name, policy in first
    ]
    cases += [
        (name, context, batch, policy, "reference", "reference", {}) for name, policy in first
    ]
    recurrent = TINY_RECURRENT if run.quick else RECURRENT
    cases += [
        (name, context, batch, "full", "kernel", implementation, {})
        for context, batch in (TINY_SHAPES if run.quick else RECURRENT_SHAPES)
        for name in recurrent
    ]
    models = models | recurrent
    for name, context, batch, policy, peer, implementation, more in cases:
        config = common | {"op": "decode", "peer": peer, "model": name, "policy": policy}
        config |= {"context": context, "batch": batch} | more
        made.append(
            Decode(config=config, suite=run, model=models[name], policy=policies()[policy],
                   backend=Backend.of(implementation))
        )  # fmt: skip
    return made


def policies() -> dict[str, Policy]:
    return {
        "full": full(),
        "kivi 2 bits": kivi(2),
        "streaming 4 + 1020": streaming(4, 1020),
        f"h2o {H2O_SHARE} + {H2O_SHARE}": h2o(H2O_SHARE, H2O_SHARE),
    }


def shapes_of(cfg: ModelConfig, kept: str, backend: Backend) -> Any:
    """The parameters' shapes in bfloat16, or with their weights in fewer bits."""
    params = abstract_params(cfg, jnp.bfloat16)
    if kept == "bfloat16":
        return params
    return jax.eval_shape(lambda tree: quantize_weights(tree, kept, backend), params)


def weights(name: tuple[str, str], shapes: Any, seed: int) -> Any:
    """Random numbers and codes, made on the device array by array."""
    if name not in _params:
        make = jax.jit(filled, static_argnums=(1, 2, 3))
        leaves, tree = jax.tree.flatten(shapes)
        arrays = [
            make(jnp.uint32(seed + i), leaf.shape, leaf.dtype, leaf.shape[-1] ** -0.5)
            for i, leaf in enumerate(leaves)
        ]
        _params[name] = jax.tree.unflatten(tree, arrays)
    return _params[name]


def largest_batch(cfg: ModelConfig, context: int = 32768) -> dict[str, Any]:
    """Rows of 32k tokens whose caches fit beside the weights, by the policies' own formulas."""
    room, geometry = (
        memory_limit(),
        cache_geometry(cfg, context, "bfloat16", Backend.of(platform="gpu")),
    )
    held = bytes_of(abstract_params(cfg, jnp.bfloat16))
    found: dict[str, Any] = {"context": context, "memory_bytes": room, "weight_bytes": held}
    for name in ("full", "kivi 2 bits"):
        row = cache_bytes_per_row(cfg, policies()[name].sized(context), geometry)
        found[f"{name}: bytes per row"] = row
        found[f"{name}: largest batch"] = int((MARGIN * room - held) // row) if room else None
    return found
