"""`Prefix`: a text that has been read once and stays in its cache.

The token read last is `pending`: the cache holds everything before it, and what comes next reads it
first, because logits are those of the last token that is read.
"""

import copy
from typing import TypeVar

from jaxinfer.cache.policy import Cache, Policy
from jaxinfer.decode.capacity import capacity_for, check_fits
from jaxinfer.decode.engine import SMALLEST_CAPACITY, bucket, repeat_rows
from jaxinfer.decode.model import Model, Prompt
from jaxinfer.models.stack import grow_cache
from jaxinfer.sparsity.method import Sparsity

Own = TypeVar("Own", bound="Prefix")


class Prefix:
    """One row's tokens and the cache that has read them; grows by doubling as turns arrive.

    `jaxinfer.session.Session` goes on from it; `Options.prefix` puts it in front of a batch.

    Args:
      model: what reads.
      policy: how its cache keeps tokens.
      context: tokens of which a budget may be a share; by default the model's whole context, as the
        length of what will come is unknown.
    """

    def __init__(self, model: Model, policy: Policy, context: int | None = None):
        most = model.config.max_positions
        self.context = most if context is None else context
        size = most if context is None else bucket(context, SMALLEST_CAPACITY)
        self.model, self.policy = model, policy.sized(size)
        self.engine = model.engine.serving(self.policy)
        self.tokens: list[int] = []  # in the cache
        self.pending: list[int] = []  # emitted or appended, not yet in the cache
        self.owed = 0  # last tokens whose text nobody was sent: of a character that is not whole
        self.capacity = SMALLEST_CAPACITY
        self._cache: Cache | None = None  # None: given away, or lost
        self._cache = self._whole_cache()

    @property
    def cache(self) -> Cache:
        """The cache of `tokens`."""
        self._take_back()
        self._cache = self._whole_cache()
        return self._cache

    def encode(self, prompt: Prompt) -> list[int]:
        """Tokens of a further turn (the very first one is encoded like any prompt)."""
        self._take_back()
        started = bool(self.tokens or self.pending)
        empty = isinstance(prompt, str) and not prompt  # also without a tokenizer
        return self.model.encode([] if empty else prompt, continues=started)

    def continued(self, prompt: Prompt) -> list[int]:
        """The tokens to read before the text goes on behind `prompt`."""
        new = self.encode(prompt)
        return self.pending + new

    def check_sparsity(self, asked: Sparsity | None) -> None:
        """Refuses another sparsity than that which has read the text."""
        own = self.model.sparsity
        if asked != own:
            ours, theirs = ("none" if one is None else one.name for one in (own, asked))
            raise ValueError(
                f"the session goes on with sparsity {ours!r}, not with {theirs!r}; leave sparsity "
                "out, or start a session with lm.session(sparsity=...)"
            )

    def append(self, prompt: Prompt) -> None:
        """Reads a turn into the cache.

        Args:
          prompt: a text, or a list of token ids.

        Raises:
          ValueError: it is no prompt, or does not fit the model's positions or the memory; nothing
            has changed then.

        Example:
          >>> import jaxinfer as ji
          >>> chat = ji.load("tiny-llama").session()
          >>> chat.append("Once upon a time")
          >>> len(chat.tokens), len(chat.pending)
          (4, 1)
        """
        tokens = self.continued(prompt)
        total = len(self.tokens) + len(tokens)
        capacity_for(self.model, self.policy, total, 0)
        self.owed = self.owed if len(tokens) == len(self.pending) else 0
        # The last token waits, so that there is something to read when its logits are wanted.
        tokens, pending = tokens[:-1], tokens[-1:]
        if tokens:
            self.reserve(total, reads=len(tokens))
            cache, _ = self.engine.prefill(self.take_cache(), None, [tokens], empty=not self.tokens)
            self.put_back(cache, tokens, pending)
        else:
            self.pending = pending

    def fork(self: Own) -> Own:
        """An independent copy."""
        cache = repeat_rows(self.cache, 1)
        other = copy.copy(self)
        other._cache = cache
        return other

    def reserve(self, tokens: int, reads: int = 1) -> None:
        """Makes room for `tokens` in all, of which `reads` are read at once."""
        capacity = max(self.capacity, bucket(tokens, SMALLEST_CAPACITY))
        grows = capacity > self.capacity
        check_fits(self.model, self.policy, 1, capacity, reads, allocates=grows)
        if grows:
            cache = grow_cache(self.model.config, self.cache, capacity)
            self.capacity, self._cache = capacity, cache

    def take_cache(self) -> Cache:
        """The cache, to be donated; the caller puts one back."""
        cache, self._cache = self._whole_cache(), None
        return cache

    def put_back(self, cache: Cache | None, read: list[int], pending: list[int]) -> None:
        """The text after it read `read`. An interrupt in here loses the cache at worst."""
        self._cache = None
        self.tokens, self.pending = self.tokens + read, pending
        self._cache = cache

    def _whole_cache(self) -> Cache:
        """The cache; made from the tokens where there is none."""
        if self._cache is not None:
            return self._cache
        check_fits(self.model, self.policy, 1, self.capacity, max(len(self.tokens), 1))
        cache = self.engine.new_cache(self.policy, 1, self.capacity, contexts=[self.context])
        if self.tokens:
            cache, _ = self.engine.prefill(cache, None, [self.tokens], empty=True)
        return cache

    def _take_back(self) -> None:
        """Ends what may still have the cache; nothing has it here."""
