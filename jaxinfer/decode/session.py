"""`Session`: a conversation on a live cache.

Each turn reads only its own tokens. A session can be forked, serve as the common prefix of a batch
(`lm.generate(prompts, prefix=session)`), and be saved and restored. The token generated last is
`pending` (so is the last one of an appended turn): the cache holds everything before it, the next
turn reads it first.

A call that fails or is interrupted (Ctrl-C) leaves a session that works: it keeps what had been
read and made, or what it had before. If the interrupt came while the cache was being replaced, the
next call reads the session's tokens again.
"""

import copy
import json
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.cache.policy import Cache, Policy
from jaxinfer.decode.engine import SMALLEST_CAPACITY, bucket, repeat_rows
from jaxinfer.decode.generate import (
    Completion,
    Run,
    Stream,
    capacity_for,
    check_fits,
    parse_options,
)
from jaxinfer.files import replacing
from jaxinfer.models.fingerprint import identity
from jaxinfer.models.stack import grow_cache

FORMAT = "jaxinfer-session-1"


class Session:
    """One row's tokens and cache; grows by doubling as turns arrive.

    Example:
        chat = lm.session()
        chat.append("Rome is the capital of")
        chat.generate(max_new_tokens=8).text
    """

    def __init__(self, lm: Any, policy: Policy):
        # A budget that is a share is one of the model's whole context: a chat's length is unknown.
        self.lm, self.policy = lm, policy.sized(lm.config.max_positions)
        self.engine = lm.engine.serving(self.policy)
        self.tokens: list[int] = []  # in the cache
        self.pending: list[int] = []  # emitted or appended, not yet in the cache
        self.capacity = SMALLEST_CAPACITY
        self._stream: Callable[[], Stream | None] = lambda: None  # the one made last, if it lives
        self._cache: Cache | None = None  # None: given away, or lost
        self._cache = self._whole_cache()

    @property
    def cache(self) -> Cache:
        """The cache of `tokens`."""
        self._end_stream()
        self._cache = self._whole_cache()
        return self._cache

    def encode(self, prompt: Any) -> list[int]:
        """Tokens of a further turn (the very first one is encoded like any prompt)."""
        self._end_stream()
        started = bool(self.tokens or self.pending)
        empty = isinstance(prompt, str) and not prompt  # also without a tokenizer
        return self.lm.encode([] if empty else prompt, continues=started)

    def continued(self, prompt: Any) -> list[int]:
        """The tokens to read before the text goes on behind `prompt`."""
        new = self.encode(prompt)
        return self.pending + new

    def append(self, prompt: Any) -> None:
        """Reads a turn into the cache."""
        tokens = self.continued(prompt)
        total = len(self.tokens) + len(tokens)
        capacity_for(self.lm, self.policy, total, 0)
        # The last token waits, so that there is something to read when `generate` wants its logits.
        tokens, pending = tokens[:-1], tokens[-1:]
        if tokens:
            self.reserve(total, reads=len(tokens))
            cache, _ = self.engine.prefill(self.take_cache(), None, [tokens], empty=not self.tokens)
            self._replace(cache, tokens, pending)
        else:
            self.pending = pending

    def generate(self, prompt: Any = "", **options: Any) -> Completion:
        """Appends `prompt`, generates, and keeps both; options as in `LM.generate`, one sample."""
        run = self._run(prompt, options)
        try:
            return run.finish()[0]
        finally:
            self._keep(run)

    def stream(self, prompt: Any = "", **options: Any) -> Stream:
        """Like `generate`, piece by piece; a cancelled stream keeps what was generated so far.

        A session has one stream at a time: its next call ends a stream that is not at its end. An
        endless one is remembered whole, as everything in a session.
        """
        stream = Stream(self._run(prompt, options), at_end=self._keep)
        self._stream = weakref.ref(stream)
        return stream

    def fork(self) -> "Session":
        """An independent copy."""
        cache = repeat_rows(self.cache, 1)
        other = copy.copy(self)
        other._cache = cache
        return other

    def reserve(self, tokens: int, reads: int = 1) -> None:
        """Makes room for `tokens` in all, of which `reads` are read at once."""
        capacity = max(self.capacity, bucket(tokens, SMALLEST_CAPACITY))
        grows = capacity > self.capacity
        check_fits(self.lm, self.policy, 1, capacity, reads, allocates=grows)
        if grows:
            cache = grow_cache(self.lm.config, self.cache, capacity)
            self.capacity, self._cache = capacity, cache

    def take_cache(self) -> Cache:
        """The cache, to be donated; the caller gives one back."""
        cache, self._cache = self._whole_cache(), None
        return cache

    def save(self, path: str | Path) -> None:
        """Writes tokens and cache to one file, under a temporary name first."""
        from safetensors.numpy import save_file

        leaves = [np.asarray(x) for x in jax.tree.leaves(self.cache)]  # ends a stream: first
        arrays = {str(i): x.view(_file_dtype(x.dtype)) for i, x in enumerate(leaves)}
        state = {"tokens": self.tokens, "pending": self.pending, "capacity": self.capacity}
        meta = self._identity() | {"state": json.dumps(state)}
        with replacing(path) as temporary:
            save_file(arrays, temporary, metadata=meta)

    @classmethod
    def restore(cls, lm: Any, path: str | Path, policy: Policy) -> "Session":
        """See `LM.restore`."""
        from safetensors import SafetensorError, safe_open

        session = cls(lm, policy)
        try:
            with safe_open(str(path), framework="numpy") as file:
                meta = file.metadata() or {}
                for name, mine in session._identity().items():
                    if meta.get(name) != mine:
                        raise ValueError(
                            f"it has {name} {meta.get(name)!r}, this model and policy have "
                            f"{mine!r}; "
                            "restore it with what saved it"
                        )
                state = json.loads(meta["state"])
                tokens, pending = list(state["tokens"]), list(state["pending"])
                session.capacity = int(state["capacity"])
                lm.encode(tokens + pending, continues=True)
                arrays = [file.get_tensor(str(i)) for i in range(len(file.keys()))]
            cache = session._filled(arrays)
            if cache.length.tolist() != [len(tokens)]:
                raise ValueError(f"its cache holds {cache.length} tokens, not {len(tokens)}")
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            raise ValueError(f"cannot read session file {path}: {error}") from None
        session._replace(cache, tokens, pending)
        return session

    def _filled(self, arrays: list[np.ndarray]) -> Cache:
        """A cache of the session's capacity with these leaves."""
        new = partial(self.engine.new_cache, self.policy, 1, self.capacity)
        leaves, tree = jax.tree.flatten(jax.eval_shape(new))
        expected = [(leaf.shape, _file_dtype(leaf.dtype)) for leaf in leaves]
        if expected != [(x.shape, x.dtype) for x in arrays]:
            raise ValueError("its arrays are not those of such a cache")
        filled = [jnp.asarray(x.view(leaf.dtype)) for x, leaf in zip(arrays, leaves, strict=True)]
        return jax.tree.unflatten(tree, filled)

    def _identity(self) -> dict[str, str]:
        """What must agree between saving and restoring."""
        return {
            "format": FORMAT,
            "model": identity(self.lm.config, self.lm.params),
            "policy": repr(self.policy),
            "dtype": self.lm.engine.dtype,
            "layout": self.engine.backend.layout,
        }

    def _run(self, prompt: Any, options: dict[str, Any]) -> Run:
        opts = parse_options({**options, "prefix": self})
        if opts.samples != 1:
            raise ValueError(
                f"a session holds one text, got samples={opts.samples}; fork it instead"
            )
        run = Run(self.lm, [prompt], opts, consume=True)
        if not run.prompts[0]:
            raise ValueError("nothing to continue: append a prompt before generating")
        return run

    def _keep(self, run: Run) -> None:
        """Takes over what a run has read and made; of one that read nothing, nothing."""
        if run.state is None:
            return
        deleted = any(leaf.is_deleted() for leaf in jax.tree.leaves(run.state))
        if not deleted:
            run.new_text()  # of an interrupted run, what nobody has seen yet
        # A speculative step may have committed tokens behind a stop string.
        lost = deleted or bool(run.dropped.any())
        new = list(run.tokens[0])
        self.capacity = max(self.capacity, run.capacity)
        # The loop read every emitted token but the last one.
        self._replace(None if lost else run.state.cache, run.prompts[0] + new[:-1], new[-1:])

    def _replace(self, cache: Cache | None, read: list[int], pending: list[int]) -> None:
        """The session after it read `read`. An interrupt in here loses the cache at worst."""
        self._cache = None
        self.tokens, self.pending = self.tokens + read, pending
        self._cache = cache

    def _whole_cache(self) -> Cache:
        """The cache; made from the tokens where there is none."""
        if self._cache is not None:
            return self._cache
        check_fits(self.lm, self.policy, 1, self.capacity, max(len(self.tokens), 1))
        cache = self.engine.new_cache(self.policy, 1, self.capacity)
        if self.tokens:
            cache, _ = self.engine.prefill(cache, None, [self.tokens], empty=True)
        return cache

    def _end_stream(self) -> None:
        """Ends a stream that still has the cache; it gives it back with what it made."""
        stream = self._stream()
        if stream is not None:
            stream.close()


def _file_dtype(dtype: Any) -> np.dtype:
    """The dtype in files: numpy's reader does not know bfloat16, so its bits are kept."""
    return np.dtype(np.uint16 if dtype == jnp.bfloat16 else dtype)
