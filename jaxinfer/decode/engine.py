"""One model's compiled programs, and the host side of a generation: buckets, chunks, requests.

Shapes are bucketed so that programs are few: cache capacity and token buffers are powers of two,
prompts go in chunks of `CHUNK` tokens and a power of two for the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.cache.policy import Cache, Policy
from jaxinfer.config import ModelConfig
from jaxinfer.decode import loop
from jaxinfer.decode.sampling import IN_PROMPT, Sampler, SamplerRows
from jaxinfer.decode.settings import random_key
from jaxinfer.decode.state import DecodeState, Requests
from jaxinfer.models.fingerprint import fingerprint
from jaxinfer.models.mixers import with_aux
from jaxinfer.models.params import served_params
from jaxinfer.models.stack import init_cache, logit_count
from jaxinfer.runtime.backend import Backend
from jaxinfer.runtime.program import Program
from jaxinfer.typing import Leaf, Params

CHUNK = 512
WHOLE = 8192  # tokens read at once, at most, for policies that store what the prompt saw in full
SMALLEST_CHUNK = 16
SMALLEST_CAPACITY = 64


def bucket(size: int, smallest: int) -> int:
    """The power of two that holds `size`, at least `smallest`."""
    return max(smallest, 1 << max(size - 1, 0).bit_length())


@dataclass
class Engine:
    """Programs of one model; each compiles once per bucket and reports its compile time."""

    config: ModelConfig
    params: Params
    backend: Backend = field(default_factory=Backend.of)
    programs: dict[str, Program] = field(default_factory=dict)

    def __post_init__(self):
        self.params = served_params(self.config, self.params)
        self.programs = self.programs or {
            "prefill": Program(
                loop.prefill,
                static_argnames=("cfg", "reads"),
                donate_argnames=("cache", "logits"),
                name="prefill",
            ),
            "init_state": Program(
                loop.init_state,
                static_argnames=("size",),
                donate_argnames=("cache", "seen"),
                name="init_state",
            ),
            "decode": Program(
                loop.decode,
                static_argnames=("cfg", "step"),
                donate_argnames=("state",),
                name="decode",
            ),
            "read": Program(
                loop.read,
                static_argnames=("cfg", "keeps"),
                donate_argnames=("cache",),
                name="read",
            ),
            "peek": Program(loop.read, static_argnames=("cfg", "keeps"), name="peek"),
        }

    def serving(self, policy: Policy) -> "Engine":
        """The engine with the policy's feature maps among its parameters; programs are shared."""
        if policy.feature_maps is not None:
            shapes_only = isinstance(jax.tree.leaves(self.params)[0], jax.ShapeDtypeStruct)
            found = None if shapes_only else fingerprint(self.params)
            policy.feature_maps.check(self.config, found)
        return replace(self, params=with_feature_maps(self.params, policy))

    @property
    def compile_s(self) -> float:
        """Seconds spent on tracing and compiling so far."""
        return sum(program.compile_s for program in self.programs.values())

    @property
    def dtype(self) -> str:
        """The computing dtype: that of the embedding."""
        return str(self.params["embed"]["tokens"].dtype)

    def new_cache(
        self,
        policy: Policy,
        batch: int,
        capacity: int,
        dtype: str | None = None,
        contexts: Sequence[int] | None = None,
    ) -> Cache:
        """An empty cache; row b's budgets that are shares are of `contexts[b]` tokens."""
        return init_cache(
            self.config, self.params, policy, batch, capacity, dtype or self.dtype,
            backend=self.backend, contexts=contexts,
        )  # fmt: skip

    def prefill(
        self, cache: Cache, logits: Leaf, prompts: Sequence[Sequence[int]], *, empty: bool
    ) -> tuple[Cache, Leaf]:
        """Appends row b's tokens `prompts[b]`; `empty` says that no row holds anything yet.

        With `Policy.prompt` "whole" it is read at once, as such methods' papers do: every token
        attends to the others in full precision, and then they are stored.
        """
        lengths = np.array([len(p) for p in prompts])
        if logits is None:
            width = logit_count(self.config, self.params)
            logits = jnp.zeros((len(prompts), width), jnp.float32)
        for first, size in chunks(int(lengths.max()), prefill_chunk(cache.policies)):
            count = np.clip(lengths - first, 0, size).astype(np.int32)
            tokens = padded([p[first : first + size] for p in prompts], size)
            cache, logits = self.programs["prefill"](
                self.config, self.params, cache, logits, tokens, jnp.asarray(count),
                reads=not (empty and first == 0),
            )  # fmt: skip
        return cache, logits

    def init_state(
        self, cache: Cache, logits: Leaf, requests: Requests, seen: Leaf, size: int
    ) -> DecodeState:
        return self.programs["init_state"](cache, logits, seen, requests, size=bucket(size, 16))

    def decode(
        self, requests: Requests, state: DecodeState, steps: int, step: loop.Step = loop.plain_step
    ) -> DecodeState:
        return self.programs["decode"](
            self.config, self.params, requests, state, jnp.int32(steps), step=step
        )


def prefill_chunk(policies: Sequence[Policy]) -> int:
    """Tokens of a prompt that are read at once, at most."""
    most = CHUNK if all(policy.prompt == "chunks" for policy in policies) else WHOLE
    limits = [policy.max_prefill_chunk for policy in policies]
    return min([most, *(limit for limit in limits if limit is not None)])


def with_feature_maps(params: Params, policy: Policy) -> Params:
    """The parameters with the policy's feature maps, if any, beside each layer's mixer."""
    if policy.feature_maps is None:
        return params
    pairs = zip(params["layers"], policy.feature_maps.layers, strict=True)
    layers = tuple(with_aux(layer, maps) for layer, maps in pairs)
    return params | {"layers": layers}


def chunks(length: int, most: int = CHUNK) -> list[tuple[int, int]]:
    """(first, size) of the pieces in which a prompt of `length` tokens is read."""
    pieces = [(first, most) for first in range(0, length - most + 1, most)]
    done = len(pieces) * most
    return pieces + ([(done, bucket(length - done, SMALLEST_CHUNK))] if done < length else [])


def padded(rows: Sequence[Sequence[int]], size: int) -> Leaf:
    """i32[B, size], rows filled up with zeros on the right."""
    out = np.zeros((len(rows), size), np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return jnp.asarray(out)


def make_requests(
    samplers: list[Sampler],
    seeds: list[int],
    limits: list[int],
    stop_tokens: Sequence[Sequence[int]],
    vocab: int,
    samples: Sequence[int] = (),
    biases: int | None = None,
) -> Requests:
    """Rows draw from their own seed and sample number (default 0), so a row's text does not depend
    on its neighbours. `stop_tokens` are a list per row; () says that no row has any. `biases` as in
    `SamplerRows.of`."""
    stops = list(stop_tokens) or [()] * len(seeds)
    width = bucket(max(map(len, stops)), 1)
    keys = jnp.stack([random_key(seed) for seed in seeds])
    numbers = jnp.asarray(samples or [0] * len(seeds), jnp.uint32)
    return Requests(
        sampler=SamplerRows.of(samplers, vocab, biases),
        keys=jax.vmap(jax.random.fold_in)(keys, numbers),
        stop_tokens=jnp.asarray([[*row, *[-1] * (width - len(row))] for row in stops], jnp.int32),
        limit=jnp.asarray(limits, jnp.int32),
    )


def seen_tokens(requests: Requests, prompts: Sequence[Sequence[int]], vocab: int) -> Leaf:
    """i32[B, V], IN_PROMPT at the prompts' tokens, or i32[B, 1] when no row has a penalty."""
    if not requests.sampler.features.penalty:
        return jnp.zeros((len(prompts), 1), jnp.int32)
    seen = np.zeros((len(prompts), vocab), np.int32)
    for row, prompt in zip(seen, prompts, strict=True):
        row[list(prompt)] = IN_PROMPT
    return jnp.asarray(seen)


def repeat_rows(cache: Cache, times: int) -> Cache:
    """A cache with every row `times` times in a row; always new buffers."""
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), cache)
