"""`LM`: a model with its tokenizer, and what users do with it.

lm = ji.load("smollm2-135m")
out = lm.generate(["The capital of France is"], max_new_tokens=16)
out[0].text, out[0].finish_reason, out[0].stats["tokens_per_s"]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxinfer.arguments import shown
from jaxinfer.cache.presets import PolicyLike, policy_of, resolve
from jaxinfer.decode import generate as generation
from jaxinfer.decode import scoring, session_file
from jaxinfer.decode.model import Prompt, rows_of
from jaxinfer.decode.options import Flags, Integers, Options, Samplers, Stop
from jaxinfer.decode.results import Completion
from jaxinfer.decode.sampling import GREEDY, Sampler
from jaxinfer.decode.scoring import Score
from jaxinfer.decode.stream import Stream
from jaxinfer.names import DraftLike, SparsityLike, draft_of
from jaxinfer.service import Service
from jaxinfer.session import Session
from jaxinfer.typing import Message


@dataclass(eq=False)
class LM(Service):
    """A loaded model and what users do with it; its fields are those of `Model`, its other forms
    those of `Forms`, and `Service` has what makes it ready for many."""

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        policy: PolicyLike = None,
        sampler: Samplers = GREEDY,
        max_new_tokens: Integers | None = 64,
        seed: Integers = 0,
        samples: int = 1,
        stop: Stop = (),
        ignore_eos: Flags = False,
        prefix: Session | None = None,
        draft: DraftLike = None,
        sparsity: SparsityLike = None,
    ) -> list[Completion]:
        """Continues every prompt, all as one batch.

        `sampler`, `max_new_tokens`, `seed`, `stop` and `ignore_eos` are for all prompts, or a list
        with one per prompt.

        Args:
          prompts: texts, which may spell control tokens (see `encode`), or lists of token ids.
          policy: how the cache keeps tokens: `ji.kivi()`, a name such as "kivi2", a mapping with
            "name" and arguments, or a list with one per layer. None keeps every token in full.
          sampler: how the next token is drawn; the default takes the likeliest.
          max_new_tokens: where a text ends at the latest.
          seed: of the draws, from -2**63 to 2**63 - 1; a text depends on its own only, and no two
            seeds draw alike.
          samples: completions per prompt. Sample i of seed s draws with `fold_in(key(s), i)`, so
            sample 0 is what one sample gives.
          stop: a string or a list of strings that end a text before them, all in the continuation;
            the name of a special token, such as "<|im_end|>", ends it at that token, and may be
            part of a string. A list that holds a list has one entry (or list) per prompt.
          ignore_eos: go on to the limit.
          prefix: a session whose text comes before every prompt, read only once.
          draft: what guesses ahead (see `ji.speculate`): its result, a smaller model of the same
            tokenizer, a trained draft, or "prompt-lookup". The text stays the model's own.
          sparsity: which method makes the blocks sparse, see `sparsified`: `ji.lte(...)`, a name, a
            mapping with "name" and arguments; None is this model, or the form that `prefix` has.

        Returns:
          One completion per prompt and sample, samples of a prompt next to each other.

        Raises:
          ValueError: an option is wrong, or the model's positions or the memory do not suffice.

        Example:
          >>> import jaxinfer as ji
          >>> lm = ji.load("tiny-llama")
          >>> out = lm.generate("Once upon a time", max_new_tokens=12, policy="kivi4")[0]
          >>> out.text, out.finish_reason
          (', the first time was the first time of the war.', 'length')
        """
        model = self._form(sparsity, prefix)
        opts = Options(
            policy=policy_of(policy),
            sampler=sampler,
            max_new_tokens=max_new_tokens,
            seed=seed,
            samples=samples,
            stop=stop,
            ignore_eos=ignore_eos,
            prefix=prefix,
            draft=draft_of(model, draft),
        )
        return generation.generate(model, rows_of(prompts), opts)

    def stream(
        self,
        prompt: Prompt,
        *,
        policy: PolicyLike = None,
        sampler: Sampler = GREEDY,
        max_new_tokens: int | None = 64,
        seed: int = 0,
        samples: int = 1,
        stop: str | Sequence[str] | None = (),
        ignore_eos: bool = False,
        prefix: Session | None = None,
        draft: DraftLike = None,
        sparsity: SparsityLike = None,
    ) -> Stream:
        """The continuation of one prompt, piece by piece as it is made.

        Args:
          prompt: a text or a list of token ids.
          max_new_tokens: None goes on without end, for policies of fixed memory ("streaming").
          samples: 1, as a stream is one text.
          policy, sampler, seed, stop, ignore_eos, prefix, draft, sparsity: as in `generate`.

        Returns:
          An iterator of text. `close()` cancels it, and `completion` is what was made so far.

        Raises:
          ValueError: as in `generate`, at the call; or the model has no tokenizer.

        Example:
          >>> import jaxinfer as ji
          >>> lm = ji.load("tiny-llama")
          >>> "".join(lm.stream("Once upon a time", max_new_tokens=12))
          ', the first time was the first time of the war.'
        """
        model = self._form(sparsity, prefix)
        opts = Options(
            policy=policy_of(policy),
            sampler=sampler,
            max_new_tokens=max_new_tokens,
            seed=seed,
            samples=samples,
            stop=stop,
            ignore_eos=ignore_eos,
            prefix=prefix,
            draft=draft_of(model, draft),
        )
        return generation.stream(model, prompt, opts)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Message] | None = None,
        documents: Sequence[Message] | None = None,
        variables: Message | None = None,
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
        """The answer to a conversation, read from its beginning; a `Session` goes on without that.

        Args:
          messages, tools, documents, variables: the turns so far and more, as in `chat_prompt`.
          samples: 1; for several answers give `chat_tokens(messages)` to `generate`.
          policy, sampler, max_new_tokens, seed, stop, ignore_eos, draft, sparsity: see `generate`.

        Raises:
          ValueError: as in `generate`; or the model has no chat template.

        Example:
          >>> import dataclasses, jaxinfer as ji
          >>> lm = ji.load("tiny-llama")  # which has no template of its own
          >>> template = "{% for message in messages %}{{ message.content }}{% endfor %}"
          >>> lm.tokenizer = dataclasses.replace(lm.tokenizer, chat_template=template)
          >>> lm.chat([{"role": "user", "content": "Once upon a time"}], max_new_tokens=12).text
          ', the first time was the first time of the war.'
        """
        if samples != 1:
            raise ValueError(f"chat gives one answer, got samples={shown(samples)}; use generate")
        model = self.sparsified(sparsity)
        opts = Options(
            policy=policy_of(policy),
            sampler=sampler,
            max_new_tokens=max_new_tokens,
            seed=seed,
            stop=stop,
            ignore_eos=ignore_eos,
            draft=draft_of(model, draft),
        )
        tokens = self.chat_tokens(messages, tools=tools, documents=documents, variables=variables)
        return generation.generate(model, [tokens], opts)[0]

    def session(self, policy: PolicyLike = None, sparsity: SparsityLike = None) -> Session:
        """A live cache to append turns to, generate from, fork and save.

        Args:
          policy: how it keeps tokens, as in `generate`.
          sparsity: as in `generate`; all of its turns are read and made with it.

        Raises:
          ValueError: there is no such policy or method, or the model cannot have it.

        Example:
          >>> import jaxinfer as ji
          >>> chat = ji.load("tiny-llama").session("kivi4")
          >>> chat.generate("Once upon a time", max_new_tokens=12).text
          ', the first time was the first time of the war.'
        """
        return Session(self.sparsified(sparsity), resolve(policy))

    def restore(
        self, path: str | Path, policy: PolicyLike = None, sparsity: SparsityLike = None
    ) -> Session:
        """The session that `Session.save` wrote; a ValueError if under another model, policy or
        sparsity."""
        return session_file.restore(self.session(policy, sparsity), path)

    def score(
        self,
        texts: Prompt | Sequence[Prompt],
        policy: PolicyLike = None,
        chunk: int | None = None,
        sparsity: SparsityLike = None,
    ) -> list[Score]:
        """Per-token log-probabilities through the cache: context committed, continuation read.

        Args:
          texts: a text or a list of token ids, or several; each of at least 2 tokens.
          policy: how the cache keeps tokens, as in `generate`.
          chunk: tokens that are read at once, each chunk attending to what the policy has kept of
            those before; None is 512, or 1 for policies that read prompts whole.
          sparsity: as in `generate`.

        Returns:
          One score per text.

        Raises:
          ValueError: a text is too short or too long, or an option is wrong.

        Example:
          >>> import jaxinfer as ji
          >>> lm = ji.load("tiny-llama")
          >>> good, odd = lm.score(["It was the first time.", "Time first the was it."])
          >>> good.perplexity < odd.perplexity
          True
        """
        model, kept = self.sparsified(sparsity), resolve(policy)
        return [scoring.score(model, model.encode(text), kept, chunk) for text in rows_of(texts)]

    def _form(self, sparsity: SparsityLike, prefix: Session | None) -> "LM":
        """The form of this model that a method makes; without one, that which has read `prefix`."""
        if sparsity is None and isinstance(prefix, Session) and isinstance(prefix.lm, LM):
            return prefix.lm if self.has_form(prefix.lm) else self
        return self.sparsified(sparsity)
