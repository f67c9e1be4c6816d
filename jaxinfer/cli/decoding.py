"""The options of `generate` and `chat` that say how a text is made, once for both."""

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypedDict

from jaxinfer.cli import options as o
from jaxinfer.cli.notices import note

if TYPE_CHECKING:
    from jaxinfer.cache.policy import Policy
    from jaxinfer.decode.sampling import Sampler
    from jaxinfer.decode.speculation import Draft, Planned
    from jaxinfer.lm import LM
    from jaxinfer.models.recurrent import RecurrentDraft
    from jaxinfer.sparsity.method import Sparsity
    from jaxinfer.speculative.topology import Topology


class Keywords(TypedDict):
    """What `generate` and `stream` of a model and of a session take alike."""

    sampler: "Sampler"
    max_new_tokens: int
    seed: int
    stop: tuple[str, ...]
    draft: "Draft | None"


class Decoding(NamedTuple):
    """The values of the options."""

    model: o.ModelOption = None
    policy: o.PolicyOption = "full"
    policy_args: o.PolicyArgsOption = ""
    temperature: o.TemperatureOption = 0.0
    top_k: o.TopKOption = 0
    top_p: o.TopPOption = 1.0
    min_p: o.MinPOption = 0.0
    repetition_penalty: o.PenaltyOption = 1.0
    logit_bias: o.BiasOption = []
    seed: o.SeedOption = 0
    stop: o.StopOption = []
    dtype: o.DtypeOption = None
    weights: o.WeightsOption = None
    draft: o.DraftOption = None
    tree: o.TreeOption = None
    sparsity: o.SparsityOption = None
    sparsity_args: o.SparsityArgsOption = ""

    def checked(self) -> "tuple[Policy, Sampler]":
        """The policy and the sampler; what is wrong is refused before a model is loaded."""
        from jaxinfer.decode.sampling import Sampler

        policy = o.make_policy(self.policy, self.policy_args)
        self._sparsity()
        sampler = Sampler(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            logit_bias=o.logit_biases(self.logit_bias),
        )
        return policy, sampler

    def open(self) -> "LM":
        """The model that is asked for."""
        from jaxinfer.cli.models import open_model

        return open_model(self.model, self.dtype, self.weights, sparsity=self._sparsity())

    def keywords(self, lm: "LM", sampler: "Sampler", max_new_tokens: int) -> Keywords:
        """The keyword arguments of a generation."""
        stop = o.stop_strings(self.stop)
        return {
            "sampler": sampler,
            "max_new_tokens": max_new_tokens,
            "seed": self.seed,
            "stop": stop,
            "draft": self.speculator(lm),
        }

    def _sparsity(self) -> "Sparsity | None":
        return o.make_sparsity(self.sparsity, self.sparsity_args, self.model)

    def speculator(self, lm: "LM") -> "Draft | None":
        """What `--draft` and `--tree` mean."""
        if self.draft is None:
            if self.tree is not None:
                raise ValueError("--tree says what --draft drafts; add --draft")
            return None
        from jaxinfer.cli.models import open_draft
        from jaxinfer.speculative.speculate import speculate
        from jaxinfer.speculative.speculator import Speculator
        from jaxinfer.speculative.topology import Topology

        model = open_draft(lm, self.draft, self.dtype, self.weights)
        if self.tree is not None:
            tree = Topology.load(self.tree)
            if tree.nodes == 1:
                note(f"{self.tree} has one node: no speculation, decoding is plain")
            return speculate(lm, model, tree)
        note("tree: the one that pays on this machine; finding it takes minutes, the first time")
        return Speculator.of(lm, None if isinstance(model, str) else model, _Fastest(lm, model))


class _Fastest:
    """Chooses the tree that pays, with a progress bar, and says where none does."""

    def __init__(self, lm: "LM", draft: "LM | RecurrentDraft | str"):
        self.lm, self.draft, self.said = lm, None if isinstance(draft, str) else draft, False

    def __call__(self, run: "Planned") -> "Topology":
        from jaxinfer.progress import bars
        from jaxinfer.speculative.tuning import WORTH, FastestTree

        with bars() as report:
            tree = FastestTree(self.lm, self.draft, report=report)(run)
        if tree.nodes == 1 and not self.said:
            self.said = True
            note(f"no speculation: no tree promises {WORTH:.2f}x plain decoding on this machine")
        return tree


def with_decoding(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb with the fields of its parameter `decoding` as options of their own."""
    own = inspect.signature(verb).parameters
    defaults, parameters = Decoding._field_defaults, []
    for name, parameter in own.items():
        shared = Decoding.__annotations__ if name == "decoding" else {}
        parameters += [
            inspect.Parameter(
                field, inspect.Parameter.KEYWORD_ONLY, default=defaults[field], annotation=kind
            )
            for field, kind in shared.items()
        ] or [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)]

    @functools.wraps(verb)
    def run(**given) -> None:
        decoding = Decoding(*(given.pop(field) for field in Decoding._fields))
        verb(decoding=decoding, **given)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run
