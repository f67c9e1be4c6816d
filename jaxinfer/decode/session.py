"""`Session`: a conversation on a live cache.

Each turn reads only its own tokens. A session can be forked, serve as the common prefix of a batch
(`lm.generate(prompts, prefix=session)`), and be saved and restored. The token generated last is
`pending` (so is the last one of an appended turn): the cache holds everything before it, the next
turn reads it first.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.cache.base import Cache, Policy
from jaxinfer.decode.engine import SMALLEST_CAPACITY, bucket, grow, repeat_rows
from jaxinfer.decode.generate import STREAM_STEPS, Completion, Run, capacity_for, parse_options
from jaxinfer.models.stack import cache_geometry

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
        self.cache: Cache = self.engine.new_cache(self.policy, 1, self.capacity)

    def encode(self, prompt: Any) -> list[int]:
        """Tokens of a further turn (the very first one is encoded like any prompt)."""
        started = bool(self.tokens or self.pending)
        if len(prompt) == 0 and (started or self.lm.tokenizer is None):
            return [] if started else self.lm.encode([])
        return self.lm.encode(prompt, continues=started)

    def append(self, prompt: Any) -> None:
        """Reads a turn into the cache."""
        tokens = self.pending + self.encode(prompt)
        capacity_for(self.lm, self.policy, len(self.tokens) + len(tokens), 0)
        # The last token waits, so that there is something to read when `generate` wants its logits.
        tokens, self.pending = tokens[:-1], tokens[-1:]
        if not tokens:
            return
        self.reserve(len(self.tokens) + len(tokens))
        self.cache, _ = self.engine.prefill(
            self.take_cache(), None, [tokens], empty=not self.tokens
        )
        self.tokens = self.tokens + tokens

    def generate(self, prompt: Any = "", **options: Any) -> Completion:
        """Appends `prompt`, generates, and keeps both; options as in `LM.generate`, one sample."""
        run = self._run(prompt, options)
        for _ in run.pieces(max(run.limits)):
            pass
        self._keep(run)
        return run.completions()[0]

    def stream(self, prompt: Any = "", **options: Any) -> Iterator[str]:
        """Like `generate`, yielding text; a cancelled stream keeps what was generated so far."""
        run = self._run(prompt, options)
        try:
            for pieces in run.pieces(STREAM_STEPS):
                if pieces[0]:
                    yield pieces[0]
        finally:
            self._keep(run)

    def fork(self) -> "Session":
        """An independent copy."""
        other = Session.__new__(Session)
        other.lm, other.policy, other.engine = self.lm, self.policy, self.engine
        other.tokens, other.pending = list(self.tokens), list(self.pending)
        other.capacity, other.cache = self.capacity, repeat_rows(self.cache, 1)
        return other

    def reserve(self, tokens: int) -> None:
        """Makes room for `tokens` in all."""
        self.capacity = max(self.capacity, bucket(tokens, SMALLEST_CAPACITY))
        self.cache = grow(self.cache, self.capacity)

    def take_cache(self) -> Cache:
        """The cache, to be donated; the session has none until it is given one back."""
        cache, self.cache = self.cache, None  # type: ignore[assignment]
        if cache is None:
            raise ValueError("this session's cache was lost in a failed call; start a new session")
        return cache

    def save(self, path: str | Path) -> None:
        """Writes tokens and cache to one file, under a temporary name first."""
        from safetensors.numpy import save_file

        path = Path(path)
        leaves = [np.asarray(x) for x in jax.tree.leaves(self.cache)]
        arrays = {str(i): x.view(_file_dtype(x.dtype)) for i, x in enumerate(leaves)}
        state = {"tokens": self.tokens, "pending": self.pending, "capacity": self.capacity}
        meta = self._identity() | {"state": json.dumps(state)}
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            save_file(arrays, temporary, metadata=meta)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

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
            session.cache = session._filled(arrays)
            if session.cache.length.tolist() != [len(tokens)]:
                raise ValueError(
                    f"its cache holds {session.cache.length} tokens, not {len(tokens)}"
                )
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            raise ValueError(f"cannot read session file {path}: {error}") from None
        session.tokens, session.pending = tokens, pending
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
        params = self.lm.params
        some = [params["final_norm"], params["embed"]["tokens"][:4], params["layers"][-1]]
        weights = [np.asarray(x[:4]).tobytes() for x in jax.tree.leaves(some)]
        model = b"".join([repr(self.lm.config).encode(), *weights])
        return {
            "format": FORMAT,
            "model": hashlib.sha256(model).hexdigest()[:16],
            "policy": repr(self.policy),
            "dtype": self.lm.engine.dtype,
            "layout": cache_geometry(self.lm.config, 1).key_layout,
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
        if run.state is None:
            return
        new = run.tokens[0]
        self.cache, self.capacity = run.state.cache, max(self.capacity, run.capacity)
        # The loop read every emitted token but the last one.
        self.tokens = self.tokens + run.prompts[0] + new[:-1]
        self.pending = new[-1:]


def _file_dtype(dtype: Any) -> np.dtype:
    """The dtype in files: numpy's reader does not know bfloat16, so its bits are kept."""
    return np.dtype(np.uint16 if dtype == jnp.bfloat16 else dtype)
