"""`LM`: a model with its tokenizer, and what users do with it.

lm = ji.load("smollm2-135m")
out = lm.generate(["The capital of France is"], max_new_tokens=16)
out[0].text, out[0].finish_reason, out[0].stats["tokens_per_s"]
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.cache.base import bytes_of
from jaxinfer.cache.policy import Policy
from jaxinfer.cache.presets import resolve
from jaxinfer.decode import generate as generation
from jaxinfer.decode.engine import CHUNK, bucket, padded
from jaxinfer.decode.generate import Completion, Stream
from jaxinfer.decode.model import Model, Prompt, plain
from jaxinfer.decode.session import Session
from jaxinfer.models.offload import in_host_memory
from jaxinfer.models.stack import forward


@dataclass(frozen=True)
class Score:
    """Log-probabilities (nats) of a text's tokens given those before; the first has none."""

    tokens: list[int]
    log_probs: list[float]
    cache_bytes: int
    chunk: int

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood per scored token, nats."""
        return -sum(self.log_probs) / max(len(self.log_probs), 1)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nll, 700.0))


@dataclass(eq=False)
class LM(Model):
    """A loaded model and what users do with it; its fields are those of `Model`."""

    def __post_init__(self):
        super().__post_init__()
        self._logits = jax.jit(lambda params, tokens: forward(self.config, params, tokens).logits)

    def generate(self, prompts: Prompt | Sequence[Prompt], **options: Any) -> list[Completion]:
        """Continues every prompt; see `jaxinfer.decode.options.Options` for the options.

        Returns one `Completion` per prompt and sample, samples of a prompt next to each other.
        """
        return generation.generate(self, _rows(prompts), **options)

    def stream(self, prompt: Prompt, **options: Any) -> Stream:
        """Yields the continuation's text as it grows; `close()` cancels, and `completion` is what
        was made so far."""
        return generation.stream(self, prompt, **options)

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Completion:
        """The answer to a conversation, a list of {"role": ..., "content": ...}; options as in
        `generate`, one sample.

        It is read from its beginning; a `Session` goes on without that.
        """
        if options.get("samples", 1) != 1:
            raise ValueError(
                f"chat gives one answer, got samples={options['samples']!r}; give "
                "chat_tokens(messages) to generate"
            )
        return self.generate([self.chat_tokens(messages)], **options)[0]

    def ahead(self, draft: Any, run: Any) -> Any:
        """What makes the steps of a run speculative; `draft` as in `Options`."""
        from jaxinfer.speculative.speculate import ahead

        return ahead(self, draft, run)

    def offloaded(self, stay: int = 0) -> "LM":
        """The same model with its layers, but the first `stay`, in host memory, from where every
        step fetches them: for models that the device cannot hold. Put a draft in front of it."""
        params = in_host_memory(self.params, stay)
        return replace(self, params=params)

    def session(self, policy: Policy | str | None = None) -> Session:
        """A live cache to append turns to, generate from, fork and save."""
        return Session(self, resolve(policy))

    def restore(self, path: str | Path, policy: Policy | str | None = None) -> Session:
        """The session that `Session.save` wrote, for the same model and policy."""
        return Session.restore(self, path, resolve(policy))

    def logits(self, tokens: Any) -> jax.Array:
        """Plain causal forward without a cache: f32[B, T, V] for tokens i32[B, T]."""
        return self._logits(self.params, jnp.asarray(tokens, jnp.int32))

    def score(
        self,
        texts: Prompt | Sequence[Prompt],
        policy: Policy | str | None = None,
        chunk: int | None = None,
    ) -> list[Score]:
        """Per-token log-probabilities through the cache: context committed, continuation read.

        The text is read in chunks of `chunk` tokens (default 512, or 1 for policies that
        read prompts whole), each attending to what the policy has kept of the chunks before.
        """
        policy = resolve(policy)
        if chunk is None:
            chunk = CHUNK if policy.prompt == "chunks" else 1
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1 token, got {chunk}")
        return [self._score(self.encode(text), policy, chunk) for text in _rows(texts)]

    def _score(self, tokens: list[int], policy: Policy, chunk: int) -> Score:
        if len(tokens) < 2:
            raise ValueError(f"scoring needs at least 2 tokens, got {len(tokens)}")
        chunk = min(chunk, bucket(len(tokens), 1))
        policy = policy.sized(bucket(len(tokens), 1))
        engine = self.engine.serving(policy)
        capacity = generation.capacity_for(self, policy, len(tokens), 0)
        policy.check_room(capacity, 0, len(tokens))
        generation.check_fits(self, policy, 1, capacity, chunk)
        cache = engine.new_cache(policy, 1, capacity)
        cache_bytes = bytes_of(cache.layers)
        found: list[np.ndarray] = []
        for first in range(0, len(tokens) - 1, chunk):
            piece, target = tokens[first : first + chunk], tokens[first + 1 : first + chunk + 1]
            cache, log_probs = engine.programs["score"](
                self.config, engine.params, cache, padded([piece], chunk), padded([target], chunk),
                jnp.asarray([len(piece)], jnp.int32),
            )  # fmt: skip
            found.append(np.asarray(log_probs)[0, : len(target)])
        return Score(tokens, np.concatenate(found).tolist(), cache_bytes, chunk)

    def warmup(
        self,
        prompt_lengths: Sequence[int] = (64,),
        batch: int = 1,
        max_new_tokens: int = 64,
        **options: Any,
    ) -> float:
        """Compiles what such a generation needs; returns the seconds it took."""
        before = self.engine.compile_s
        for length in prompt_lengths:
            generation.generate(
                self,
                [[0] * length] * batch,
                **{**options, "max_new_tokens": max_new_tokens, "limit": 2, "ignore_eos": True},
            )
        return self.engine.compile_s - before


def _rows(prompts: Any) -> list[Any]:
    """A list of prompts from one prompt or several."""
    if isinstance(prompts, str):
        return [prompts]
    try:
        rows = list(plain(prompts))
    except TypeError:
        raise ValueError(
            f"prompts must be texts or lists of token ids, got {prompts!r:.80}"
        ) from None
    return [rows] if rows and all(isinstance(p, int | np.integer) for p in rows) else rows
