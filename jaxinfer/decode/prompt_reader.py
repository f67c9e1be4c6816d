"""`PromptReader`: a prompt on its way into a cache of one row, piece by piece."""

import jax.numpy as jnp
import numpy as np

from jaxinfer.cache.policy import Cache, Policy
from jaxinfer.decode.engine import Engine, chunks, padded, prefill_chunk
from jaxinfer.models.stack import logit_count


class PromptReader:
    """A prompt that is read into a cache of one row, a piece at a time.

    Args:
      engine: what reads, with the policy's feature maps.
      policy: how the cache keeps tokens. One that reads prompts whole takes them in one piece.
      capacity: of the cache, in tokens.
      tokens: the prompt.
      chunk: tokens of a piece at most.
      scored: keep the log-probabilities of the prompt's tokens.
      cached: a cache of one row that has read the first tokens already; None begins an empty one.
    """

    def __init__(
        self,
        engine: Engine,
        policy: Policy,
        capacity: int,
        tokens: list[int],
        chunk: int,
        *,
        scored: bool = False,
        cached: Cache | None = None,
    ):
        empty = cached is None
        self.cached_tokens = 0 if empty else int(cached.length[0])
        if empty:
            cached = engine.new_cache(policy, 1, capacity, contexts=[len(tokens)])
        self.cache = cached
        width = logit_count(engine.config, engine.params)
        self.logits = jnp.zeros((1, width), jnp.float32)
        self.log_probs: list[float] = []  # of tokens[1:], as far as they are read
        self._engine, self._tokens, self._scored = engine, tokens, scored
        most = piece_size(self.cache.policies, chunk)
        pieces = chunks(len(tokens) - self.cached_tokens, most)
        self._pieces = [(self.cached_tokens + first, size) for first, size in reversed(pieces)]

    @property
    def finished(self) -> bool:
        return not self._pieces

    def read(self) -> None:
        """Reads the next piece."""
        first, size = self._pieces.pop()
        part = self._tokens[first : first + size]
        engine, count = self._engine, jnp.asarray([len(part)], jnp.int32)
        arguments = engine.config, engine.params, self.cache, self.logits, padded([part], size)
        if not self._scored:
            read = engine.programs["prefill"]
            self.cache, self.logits = read(*arguments, count, reads=first > 0)
            self.logits.block_until_ready()
            return
        targets = self._tokens[first + 1 : first + size + 1]
        read = engine.programs["prefill_scored"]
        self.cache, self.logits, found = read(
            *arguments, padded([targets], size), count, reads=first > 0
        )
        self.log_probs += np.asarray(found)[0, : len(targets)].tolist()

    def drop(self) -> None:
        """Gives up what was read."""
        self.cache = self.logits = None


def piece_size(policies: tuple[Policy, ...], chunk: int) -> int:
    """Tokens that are read at once, at most."""
    most = prefill_chunk(policies)
    return min(chunk, most) if all(policy.prompt == "chunks" for policy in policies) else most
