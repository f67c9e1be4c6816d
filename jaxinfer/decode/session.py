"""`Session`: a conversation on a live cache.

Each turn reads only its own tokens. A session can be forked, serve as the common prefix of a batch
(`lm.generate(prompts, prefix=session)`), and be saved and restored. The token generated last is
`pending` (so is the last one of an appended turn): the cache holds everything before it, the next turn
reads it first.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.cache.base import Cache, Policy
from jaxinfer.decode.engine import SMALLEST_CAPACITY, bucket, grow, repeat_rows
from jaxinfer.decode.generate import STREAM_STEPS, Completion, Run, capacity_for, parse_options

FORMAT = "jaxinfer-session-1"


class Session:
    """One row's tokens and cache; grows by doubling as turns arrive.

    Example:
        chat = lm.session()
        chat.append("Rome is the capital of")
        chat.generate(max_new_tokens=8).text
    """

    def __init__(self, lm: Any, policy: Policy):
        self.lm, self.policy = lm, policy
        self.tokens: list[int] = []  # in the cache
        self.pending: list[int] = []  # emitted or appended, not yet in the cache
        self.cache: Cache = lm.engine.new_cache(policy, 1, SMALLEST_CAPACITY)

    def encode(self, prompt: Any) -> list[int]:
        """Tokens of a further turn (the very first one is encoded like any prompt)."""
        started = bool(self.tokens or self.pending)
        return [] if started and len(prompt) == 0 else self.lm.encode(prompt, continues=started)

    def append(self, prompt: Any) -> None:
        """Reads a turn into the cache."""
        tokens = self.pending + self.encode(prompt)
        capacity_for(self.lm, len(self.tokens) + len(tokens), 0)
        # The last token waits, so that there is something to read when `generate` wants its logits.
        tokens, self.pending = tokens[:-1], tokens[-1:]
        if not tokens:
            return
        self.reserve(len(self.tokens) + len(tokens))
        self.cache, _ = self.lm.engine.prefill(
            self.take_cache(), None, [tokens], empty=not self.tokens
        )
        self.tokens = self.tokens + tokens

    def generate(self, prompt: Any = "", **options: Any) -> Completion:
        """Appends `prompt`, generates, and keeps both; options as in `LM.generate`, one sample."""
        run = self._run(prompt, options)
        for _ in run.pieces(_steps(run, max(run.limits))):
            pass
        self._keep(run)
        return run.completions()[0]

    def stream(self, prompt: Any = "", **options: Any) -> Iterator[str]:
        """Like `generate`, yielding text; a cancelled stream keeps what was generated so far."""
        run = self._run(prompt, options)
        try:
            for pieces in run.pieces(_steps(run, STREAM_STEPS)):
                if pieces[0]:
                    yield pieces[0]
        finally:
            self._keep(run)

    def fork(self) -> "Session":
        """An independent copy."""
        other = Session.__new__(Session)
        other.lm, other.policy = self.lm, self.policy
        other.tokens, other.pending = list(self.tokens), list(self.pending)
        other.cache = repeat_rows(self.cache, 1)
        return other

    def reserve(self, tokens: int) -> None:
        """Makes room for `tokens` in all."""
        self.cache = grow(self.cache, bucket(tokens, SMALLEST_CAPACITY))

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
        arrays = {str(i): np.asarray(x) for i, x in enumerate(jax.tree.leaves(self.cache))}
        state = {"tokens": self.tokens, "pending": self.pending}
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
                            f"session file {path} has {name} {meta.get(name)!r}, this model and policy "
                            f"have {mine!r}; restore it with what saved it"
                        )
                state = json.loads(meta["state"])
                arrays = [jnp.asarray(file.get_tensor(str(i))) for i in range(len(file.keys()))]
        except (SafetensorError, KeyError, OSError) as error:
            raise ValueError(f"cannot read session file {path}: {error}") from None
        session.tokens, session.pending = state["tokens"], state["pending"]
        session.reserve(len(session.tokens))
        leaves, tree = jax.tree.flatten(session.cache)
        if len(leaves) != len(arrays):
            raise ValueError(f"session file {path} has {len(arrays)} arrays, expected {len(leaves)}")
        for mine, array in zip(leaves, arrays, strict=True):
            if mine.dtype != array.dtype or mine.ndim != array.ndim:
                raise ValueError(
                    f"session file {path} holds {array.dtype}{array.shape} where this back end keeps "
                    f"{mine.dtype}{mine.shape}; restore it on the kind of device that saved it"
                )
        session.cache = jax.tree.unflatten(tree, arrays)
        return session

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
        }

    def _run(self, prompt: Any, options: dict[str, Any]) -> Run:
        opts = parse_options({**options, "prefix": self})
        if opts.samples != 1:
            raise ValueError(f"a session holds one text, got samples={opts.samples}; fork it instead")
        run = Run(self.lm, [prompt], opts, consume=True)
        if not run.prompts[0]:
            raise ValueError("nothing to continue: append a prompt before generating")
        return run

    def _keep(self, run: Run) -> None:
        if run.state is None:
            return
        written = int(run.state.written[0])
        new = np.asarray(run.state.tokens)[0, :written].tolist()
        self.cache = run.state.cache
        # The loop read every emitted token but the last one.
        self.tokens = self.tokens + run.prompts[0] + new[:-1]
        self.pending = new[-1:]


def _steps(run: Run, steps: int) -> int:
    """Model steps between two looks at the text; one with stop strings, so that a session does not
    keep tokens that nobody saw."""
    return 1 if run.opts.stop_strings else steps


__all__ = ["Session"]
