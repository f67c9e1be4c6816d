"""`Service`: a model that is made ready, and that serves many requests at once."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxinfer.cache.presets import PolicyLike, policy_of, resolve
from jaxinfer.decode import generate as generation
from jaxinfer.decode.batcher import Batcher
from jaxinfer.decode.options import Options
from jaxinfer.decode.sampling import GREEDY, Sampler
from jaxinfer.decode.serving import Serving
from jaxinfer.forms import Forms
from jaxinfer.names import DraftLike, SparsityLike, draft_of


@dataclass(eq=False)
class Service(Forms):
    """A model that compiles ahead what will be asked of it, and that answers many at once."""

    def batcher(
        self,
        slots: int = 8,
        context: int = 2048,
        policy: PolicyLike = None,
        draft: DraftLike = None,
        queue: int = 64,
        *,
        chunk: int = 64,
        prefix_bytes: int = 0,
        sparsity: SparsityLike = None,
    ) -> Batcher:
        """Continuous batching: requests join and leave a running batch.

        Args:
          slots: requests that run at once, a power of two; the compiled batch has 1, 2, 4, ... rows
            as they are needed.
          context: tokens of a request, prompt and answer together; no more than the model's
            positions, unless the policy is endless.
          policy, draft, sparsity: as in `LM.generate`, for all requests.
          queue: requests that wait at most.
          chunk: tokens of a prompt, rounded up to a power of two, that are read between two rounds
            of steps; policies that read prompts whole take it at once.
          prefix_bytes: bytes of what stays of texts that were read and made, so that a prompt which
            begins like one of them reads only the rest, the least recently used first to go. With
            the policy full any common beginning serves, with streaming a whole earlier text;
            policies that read prompts whole refuse it.

        Returns:
          A batcher, which is closed when no longer needed, or by `with`.

        Raises:
          ValueError: an option is wrong, or the model's positions or the memory do not suffice.

        Example:
          >>> import jaxinfer as ji
          >>> lm = ji.load("tiny-llama")
          >>> with lm.batcher(slots=1, context=64) as batcher:
          ...     batcher.submit("Once upon a time", max_new_tokens=12).result().text
          ', the first time was the first time of the war.'
        """
        model = self.sparsified(sparsity)
        draft = draft_of(model, draft)
        return Batcher(
            Serving(
                model, resolve(policy), draft, slots=slots, context=context, chunk=chunk,
                prefix_bytes=prefix_bytes,
            ),
            queue,
        )  # fmt: skip

    def warmup(
        self,
        prompt_lengths: Sequence[int] = (64,),
        batch: int = 1,
        max_new_tokens: int = 64,
        *,
        policy: PolicyLike = None,
        sampler: Sampler = GREEDY,
        samples: int = 1,
        draft: DraftLike = None,
        sparsity: SparsityLike = None,
    ) -> float:
        """Compiles what such a generation needs, and returns the seconds that it took.

        Args:
          prompt_lengths: tokens of the prompts that will come; those of one power of two are alike.
          batch: how many of them at once.
          max_new_tokens, policy, sampler, samples, draft, sparsity: as in `generate`.

        Example:
          >>> import jaxinfer as ji
          >>> lm = ji.load("tiny-llama")
          >>> lm.warmup([16], max_new_tokens=8) > 0
          True
        """
        model = self.sparsified(sparsity)
        opts = Options(
            policy=policy_of(policy),
            sampler=sampler,
            max_new_tokens=max_new_tokens,
            samples=samples,
            ignore_eos=True,
            draft=draft_of(model, draft),
            limit=2,
        )
        return generation.warmup(model, prompt_lengths, batch, opts)
