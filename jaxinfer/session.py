"""`Session`: a conversation on a live cache.

Each turn reads only its own tokens. A session can be forked, serve as the common prefix of a batch
(`lm.generate(prompts, prefix=session)`), and be saved and restored.

A call that fails or is interrupted (Ctrl-C) leaves a session that works: it keeps what had been
read and made, or what it had before. If the interrupt came while the cache was being replaced, the
next call reads the session's tokens again.
"""

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from jaxinfer.cache.policy import Policy
from jaxinfer.cache.presets import PolicyLike, policy_of
from jaxinfer.decode import session_file
from jaxinfer.decode.model import Model, Prompt
from jaxinfer.decode.options import Options
from jaxinfer.decode.prefix import Prefix
from jaxinfer.decode.results import Completion
from jaxinfer.decode.run import Run
from jaxinfer.decode.sampling import GREEDY, Sampler
from jaxinfer.decode.stream import Stream
from jaxinfer.names import DraftLike, SparsityLike, draft_of, sparsity_of


class Session(Prefix):
    """A text that goes on turn by turn, as `LM.session` starts it; see `Prefix` for `append`,
    `fork`, `tokens` and `pending`.

    Example:
      >>> import jaxinfer as ji
      >>> chat = ji.load("tiny-llama").session()
      >>> chat.append("Once upon a time")
      >>> chat.generate(max_new_tokens=12).text
      ', the first time was the first time of the war.'
      >>> chat.generate(" Then", max_new_tokens=4).tokens == chat.tokens[-3:] + chat.pending
      True
    """

    def __init__(self, model: Model, policy: Policy):
        self._stream: Callable[[], Stream | None] = lambda: None  # the one made last, if it lives
        super().__init__(model, policy)

    @property
    def lm(self) -> Model:
        """The model that goes on with the text."""
        return self.model

    def generate(
        self,
        prompt: Prompt = "",
        *,
        policy: PolicyLike = None,
        sampler: Sampler = GREEDY,
        max_new_tokens: int = 64,
        seed: int = 0,
        samples: int = 1,
        stop: str | Sequence[str] | None = (),
        ignore_eos: bool = False,
        draft: DraftLike = None,
        sparsity: SparsityLike = None,
    ) -> Completion:
        """Appends a prompt, generates, and keeps both.

        Args:
          prompt: a text or a list of token ids; may be empty behind an earlier turn.
          policy, sparsity: None, or the session's own: they cannot change.
          samples: 1; fork the session for several.
          sampler, max_new_tokens, seed, stop, ignore_eos, draft: as in `LM.generate`.

        Returns:
          What was generated behind the prompt.

        Raises:
          ValueError: an option is wrong, or there is nothing to continue; nothing has changed then.

        Example:
          >>> import jaxinfer as ji
          >>> chat = ji.load("tiny-llama").session()
          >>> chat.generate("Once upon a time", max_new_tokens=3).finish_reason
          'length'
        """
        run = self._run(
            prompt,
            Options(
                policy=policy_of(policy),
                sampler=sampler,
                max_new_tokens=max_new_tokens,
                seed=seed,
                samples=samples,
                stop=stop,
                ignore_eos=ignore_eos,
                prefix=self,
                draft=draft_of(self.model, draft),
            ),
            sparsity,
        )
        try:
            return run.finish()[0]
        finally:
            self._keep(run)

    def stream(
        self,
        prompt: Prompt = "",
        *,
        policy: PolicyLike = None,
        sampler: Sampler = GREEDY,
        max_new_tokens: int | None = 64,
        seed: int = 0,
        samples: int = 1,
        stop: str | Sequence[str] | None = (),
        ignore_eos: bool = False,
        draft: DraftLike = None,
        sparsity: SparsityLike = None,
    ) -> Stream:
        """Like `generate`, piece by piece; a cancelled stream keeps what was generated so far.

        A session has one stream at a time: its next call ends a stream that is not at its end. An
        endless one (max_new_tokens=None) is remembered whole, as everything in a session.

        Args:
          prompt: a text or a list of token ids; may be empty behind an earlier turn.
          policy, sparsity: None, or the session's own: they cannot change.
          samples: 1; fork the session for several.
          sampler, max_new_tokens, seed, stop, ignore_eos, draft: as in `LM.stream`.

        Returns:
          An iterator of text; see `LM.stream`.

        Raises:
          ValueError: an option is wrong, or there is nothing to continue; nothing has changed then.

        Example:
          >>> import jaxinfer as ji
          >>> chat = ji.load("tiny-llama").session()
          >>> "".join(chat.stream("Once upon a time", max_new_tokens=12))
          ', the first time was the first time of the war.'
        """
        run = self._run(
            prompt,
            Options(
                policy=policy_of(policy),
                sampler=sampler,
                max_new_tokens=max_new_tokens,
                seed=seed,
                samples=samples,
                stop=stop,
                ignore_eos=ignore_eos,
                prefix=self,
                draft=draft_of(self.model, draft),
            ),
            sparsity,
        )
        stream = Stream(run, at_end=self._keep)
        self._stream = weakref.ref(stream)
        return stream

    def save(self, path: str | Path) -> None:
        """Writes tokens and cache to one file, which `LM.restore` reads."""
        session_file.save(self, path)

    def _run(self, prompt: Prompt, opts: Options, sparsity: SparsityLike) -> Run:
        if opts.samples != 1:
            raise ValueError(
                f"a session holds one text, got samples={opts.samples}; fork it instead"
            )
        asked = sparsity_of(sparsity, self.model.name)
        if asked is not None:
            self.check_sparsity(asked)
        run = Run(self.model, [prompt], opts, consume=True)
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
        lost = deleted or bool(run.out.dropped.any())
        new = list(run.out.tokens[0])
        self.owed = run.out.owed
        self.capacity = max(self.capacity, run.capacity)
        # The loop read every emitted token but the last one.
        self.put_back(None if lost else run.state.cache, run.prompts[0] + new[:-1], new[-1:])

    def _take_back(self) -> None:
        """Ends a stream that still has the cache; it gives it back with what it made."""
        stream = self._stream()
        if stream is not None:
            stream.close()
