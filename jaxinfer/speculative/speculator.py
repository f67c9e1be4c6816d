"""`Speculator`: a target with a draft in front of it, an object like an `LM`.

`jaxinfer.speculative.speculate` makes one. The text is the target's own: at temperature 0 the same
tokens, else the same distribution.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from jaxinfer.cache.policy import Policy
from jaxinfer.cache.presets import PolicyLike, policy_of, resolve
from jaxinfer.decode import generate as generation
from jaxinfer.decode import scoring
from jaxinfer.decode.model import Model, Prompt, rows_of
from jaxinfer.decode.options import Flags, Integers, Options, Samplers, Stop
from jaxinfer.decode.prefix import Prefix
from jaxinfer.decode.results import Completion
from jaxinfer.decode.sampling import GREEDY, Sampler
from jaxinfer.decode.scoring import Score
from jaxinfer.decode.speculation import Planned
from jaxinfer.decode.stream import Stream
from jaxinfer.models.filter_form import check_drafts
from jaxinfer.models.recurrent import RecurrentDraft
from jaxinfer.speculative.drafters import Drafter, Method
from jaxinfer.speculative.drafts import drafter_for
from jaxinfer.speculative.plan import SpeculativeRun
from jaxinfer.speculative.topology import Topology
from jaxinfer.typing import Message

TreeChooser: TypeAlias = Callable[[Planned], Topology]
"""Chooses the tree of a run; a root alone says that speculation does not pay."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Speculator:
    """A target with a draft in front of it; see `speculate`."""

    target: Model
    draft: Model | RecurrentDraft | None  # None: prompt lookup
    topology: Topology | TreeChooser
    draft_policy: Policy | None = None  # None: keeps everything
    drafter: Drafter = field(repr=False)

    @classmethod
    def of(
        cls,
        target: Model,
        draft: Model | RecurrentDraft | None,
        topology: Topology | TreeChooser,
        *,
        method: Method = "sequoia",
        support: int = 64,
        draft_policy: Policy | None = None,
    ) -> "Speculator":
        """With the drafter that `draft` needs; arguments as in `speculate`, names resolved.

        Raises:
            ValueError: as `speculate`.
        """
        for model in (target, draft):
            if isinstance(model, Model):
                check_drafts(model.config)
        drafter = drafter_for(target, draft, method, support)
        if isinstance(topology, Topology):
            drafter.check(topology)
        return cls(
            target=target,
            draft=draft,
            topology=topology,
            draft_policy=draft_policy,
            drafter=drafter,
        )

    def plan(self, run: Planned) -> SpeculativeRun | None:
        """What makes the steps of a run of the target speculative; None where it does not pay.

        Raises:
            ValueError: the run is another model's, or the draft cannot fill the tree.
        """
        if run.model is not self.target:
            raise ValueError(
                "the draft was made for another model; call ji.speculate with this one"
            )
        chosen = self.topology
        tree = chosen if isinstance(chosen, Topology) else chosen(run)
        if tree.nodes == 1:
            return None
        return SpeculativeRun(run, tree, self.drafter, self.draft, self.draft_policy)

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
        prefix: Prefix | None = None,
    ) -> list[Completion]:
        """Continues every prompt, as the target's `LM.generate` does, in fewer steps.

        Args:
            prompts: a text or a list of token ids, or several of them.
            policy: the target's cache policy.
            sampler, max_new_tokens, seed, samples, stop, ignore_eos, prefix: as in `LM.generate`.

        Returns:
            One completion per prompt and sample; `stats.tokens_per_step` says what it brought.

        Raises:
            ValueError: as in `LM.generate`, or the draft cannot fill the tree.
        """
        opts = Options(
            policy=policy_of(policy),
            sampler=sampler,
            max_new_tokens=max_new_tokens,
            seed=seed,
            samples=samples,
            stop=stop,
            ignore_eos=ignore_eos,
            prefix=prefix,
            draft=self,
        )
        return generation.generate(self.target, rows_of(prompts), opts)

    def stream(
        self,
        prompt: Prompt,
        *,
        policy: PolicyLike = None,
        sampler: Sampler = GREEDY,
        max_new_tokens: int | None = 64,
        seed: int = 0,
        stop: str | Sequence[str] | None = (),
        ignore_eos: bool = False,
        prefix: Prefix | None = None,
    ) -> Stream:
        """The continuation of one prompt, piece by piece, as in `LM.stream`."""
        opts = Options(
            policy=policy_of(policy),
            sampler=sampler,
            max_new_tokens=max_new_tokens,
            seed=seed,
            stop=stop,
            ignore_eos=ignore_eos,
            prefix=prefix,
            draft=self,
        )
        return generation.stream(self.target, prompt, opts)

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
        stop: str | Sequence[str] | None = (),
        ignore_eos: bool = False,
    ) -> Completion:
        """The answer to a conversation, as in `LM.chat`."""
        opts = Options(
            policy=policy_of(policy),
            sampler=sampler,
            max_new_tokens=max_new_tokens,
            seed=seed,
            stop=stop,
            ignore_eos=ignore_eos,
            draft=self,
        )
        tokens = self.target.chat_tokens(
            messages, tools=tools, documents=documents, variables=variables
        )
        return generation.generate(self.target, [tokens], opts)[0]

    def score(
        self,
        texts: Prompt | Sequence[Prompt],
        policy: PolicyLike = None,
        chunk: int | None = None,
    ) -> list[Score]:
        """The target's per-token log-probabilities, as in `LM.score`: a draft changes none."""
        target, resolved = self.target, resolve(policy)
        rows = rows_of(texts)
        return [scoring.score(target, target.encode(text), resolved, chunk) for text in rows]
