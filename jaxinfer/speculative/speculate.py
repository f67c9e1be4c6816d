"""`speculate`: a target with a draft in front of it, an object like an `LM`.

spec = ji.speculate(target=lm, draft=small, topology=ji.Topology.optimal(p, nodes=16, levels=6))
spec.generate(["The capital of France is"])[0].stats.tokens_per_step

The text is the target's own: at temperature 0 the same tokens, else the same distribution.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import jax.numpy as jnp
import numpy as np

from jaxinfer.cache.policy import Policy
from jaxinfer.cache.presets import full, resolve
from jaxinfer.decode.capacity import capacity_for, check_fits
from jaxinfer.decode.engine import Engine, bucket
from jaxinfer.decode.results import Completion
from jaxinfer.decode.run import Run
from jaxinfer.decode.state import DecodeState
from jaxinfer.decode.stream import Stream
from jaxinfer.lm import LM
from jaxinfer.models.recurrent import RecurrentDraft
from jaxinfer.speculative.drafters import (
    METHODS,
    Drafter,
    LookupDrafter,
    LookupState,
    Method,
    ModelDrafter,
    ModelState,
)
from jaxinfer.speculative.recurrent import RecurrentDrafter
from jaxinfer.speculative.step import TreeStep
from jaxinfer.speculative.topology import Topology

PROMPT_LOOKUP = "prompt-lookup"


@dataclass(frozen=True, kw_only=True, eq=False)
class Speculator:
    """See `speculate`. `generate`, `stream`, `chat` and `score` take the options of `LM`."""

    target: LM
    draft: LM | RecurrentDraft | None  # None: prompt lookup
    topology: Topology | None  # None: measured and chosen for the sampler and policy of a call
    draft_policy: Policy | None = None
    drafter: Drafter = field(repr=False)

    def generate(self, prompts: Any, **options: Any) -> list[Completion]:
        return self.target.generate(prompts, **{**options, "draft": self})

    def stream(self, prompt: Any, **options: Any) -> Stream:
        return self.target.stream(prompt, **{**options, "draft": self})

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Completion:
        return self.target.chat(messages, **{**options, "draft": self})

    def score(self, *arguments: Any, **options: Any) -> Any:
        """The target's: a draft changes no probability."""
        return self.target.score(*arguments, **options)

    def plan(self, run: Run) -> "SpeculativeRun | None":
        """The speculation of a run; None where it does not pay."""
        if run.model is not self.target:
            raise ValueError(
                "the draft was made for another model; call ji.speculate with this one"
            )
        topology = self.tree_for(run)
        return None if topology.nodes == 1 else SpeculativeRun(self, topology, run)

    def tree_for(self, run: Run) -> Topology:
        """The tree of a run; a root alone says that speculation does not pay."""
        if self.topology is not None:
            return self.topology
        from jaxinfer.speculative.tuning import tune

        tuned = tune(
            self.target, self.draft, run.samplers[0], policy=run.policy,
            draft_policy=self.draft_policy,
        )  # fmt: skip
        return tuned.choice().topology


def speculate(
    target: LM,
    draft: Any,
    topology: Topology | str = "auto",
    *,
    method: str = "sequoia",
    support: int = 64,
    policy: Any = None,
) -> Speculator:
    """Puts a draft in front of `target`.

    Args:
        target: the model whose text is wanted.
        draft: a smaller `LM` of the same tokenizer; a `RecurrentDraft` that was trained for this
            target; or "prompt-lookup" (arXiv 2304.04487), which continues the text as it went on
            before.
        topology: the tree that is drafted per step. "auto" measures acceptance and times with this
            machine, sampler and policy at the first call, which takes about a minute, keeps them in
            the user's cache folder and takes the fastest tree, or none (see `tuning.tune`).
        method: "sequoia" (arXiv 2402.12374) draws children without replacement; "specinfer" with
            replacement (arXiv 2305.09781), "top-k" and "naive" are there to compare with.
        support: how many of the draft's likeliest tokens a node's children are drawn from; more pay
            at high temperatures only.
        policy: the draft's cache policy; the default keeps everything.

    Raises:
        ValueError: for a draft whose tokens are not the target's, or a tree that it cannot fill.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known methods: {', '.join(METHODS)}")
    tree = None if topology == "auto" else topology
    if not isinstance(tree, Topology | None):
        raise ValueError(f'topology must be a Topology or "auto", got {topology!r:.80}')
    if isinstance(draft, str):
        if draft != PROMPT_LOOKUP:
            raise ValueError(f'draft must be a model or "{PROMPT_LOOKUP}", got {draft!r}')
        model, drafter = None, LookupDrafter()
    elif isinstance(draft, RecurrentDraft):
        if draft.config.hidden_size != target.config.hidden_size:
            raise ValueError(
                f"the draft continues states of {draft.config.hidden_size} numbers, the target has "
                f"{target.config.hidden_size}; give the target that it was trained for"
            )
        model = draft
        size = min(support, draft.config.vocab_size)
        drafter = RecurrentDrafter(size=max(size, 1), method=cast(Method, method))
    elif isinstance(draft, LM):
        check_vocabularies(target, draft)
        size = min(support, draft.config.vocab_size, target.config.vocab_size)
        model = draft
        kind = cast(Method, method)
        drafter = ModelDrafter(cfg=draft.config, size=max(size, 1), method=kind)
    else:
        raise ValueError(
            f'draft must be an LM, a RecurrentDraft or "{PROMPT_LOOKUP}", got '
            f"{type(draft).__name__}"
        )
    if tree is not None:
        drafter.check(tree)
    return Speculator(
        target=target,
        draft=model,
        topology=tree,
        draft_policy=None if policy is None else resolve(policy),
        drafter=drafter,
    )


def early_exit(lm: LM, layers: int) -> LM:
    """The first `layers` layers of a model with its own final norm and head, as a draft of it;
    shares its arrays."""
    if not 1 <= layers < lm.config.num_layers:
        raise ValueError(
            f"an early exit of {lm.config.num_layers} layers has 1 to {lm.config.num_layers - 1} "
            f"of them, got {layers}"
        )
    windows = lm.config.sliding_windows
    cfg = replace(
        lm.config,
        num_layers=layers,
        sliding_windows=windows[:layers] if isinstance(windows, tuple) else windows,
    )
    params = {**lm.params, "layers": tuple(lm.params["layers"][:layers])}
    return LM(cfg, params, lm.tokenizer, f"{lm.name}[:{layers}]", lm.implementation)


def check_vocabularies(target: LM, draft: LM) -> None:
    """Refuses a draft whose token ids mean something else; a padded vocabulary may differ in
    size."""
    ours, theirs = target.tokenizer, draft.tokenizer
    if ours is not None and theirs is not None and ours is not theirs:
        shared = min(ours.vocab_size, theirs.vocab_size)
        probes = np.unique(np.linspace(0, shared - 1, 257).astype(int)).tolist()
        for token in probes:
            mine, other = (x.decode([token], skip_special=False) for x in (ours, theirs))
            if mine != other:
                raise ValueError(
                    f"token {token} is {mine!r} for the target and {other!r} for the draft; a "
                    "draft needs the target's tokenizer"
                )
    sizes = target.config.vocab_size, draft.config.vocab_size
    if max(sizes) - min(sizes) > max(sizes) // 8:
        raise ValueError(
            f"the target has {sizes[0]} tokens and the draft {sizes[1]}; a draft needs the "
            "target's tokenizer"
        )


class SpeculativeRun:
    """One run's speculation: checks it before anything is compiled, then sets up the draft."""

    def __init__(self, speculator: Speculator, topology: Topology, run: Run):
        self.speculator, self.run = speculator, run
        speculator.drafter.check(topology)
        self.step = TreeStep(topology=topology, drafter=speculator.drafter)
        self.most = topology.levels  # tokens that a step emits at most
        if not run.policy.lossless_under_tree:
            warnings.warn(
                f"policy {run.policy.name!r} decides what to keep after every token; with several "
                "tokens per step the text may differ from plain decoding's",
                stacklevel=3,
            )
        lm, limit = speculator.draft, max(run.limits)
        context = max(map(len, run.contexts))
        if lm is None:
            if run.endless:
                raise ValueError(
                    "prompt lookup remembers the whole text; give max_new_tokens, or a draft model"
                )
            self.engine = run.engine
            self.capacity = bucket(context + limit, 64)
            return
        if isinstance(lm, RecurrentDraft):
            self.engine = replace(run.engine, params=run.engine.params | {"draft": lm.params})
            return
        policy = speculator.draft_policy
        if policy is None:
            policy = run.policy if run.endless and run.policy.feature_maps is None else full()
        self.policy = policy.sized(bucket(context, 64))
        self.capacity = capacity_for(lm, self.policy, context, limit)
        check_fits(lm, self.policy, len(run.rows), self.capacity, context)
        self._engine = lm.engine.serving(self.policy)
        params = run.engine.params | {"draft": self._engine.params}
        self.engine: Engine = replace(run.engine, params=params)

    def init_state(self, state: DecodeState) -> DecodeState:
        """The state with the draft's, which has read the same text."""
        contexts = self.run.contexts
        if self.speculator.draft is None:
            history = np.zeros((len(contexts), self.capacity), np.int32)
            for row, context in zip(history, contexts, strict=True):
                row[: len(context)] = context
            lengths = np.array([len(context) for context in contexts], np.int32)
            history[np.arange(len(contexts)), lengths] = np.asarray(state.token)
            drafter: Any = LookupState(jnp.asarray(history), jnp.asarray(lengths + 1))
        elif isinstance(self.speculator.draft, RecurrentDraft):
            shape = len(contexts), self.speculator.draft.config.hidden_size
            drafter = jnp.zeros(shape, jnp.float32)
        else:
            cache = self._engine.new_cache(self.policy, len(contexts), self.capacity)
            read = [context[:-1] for context in contexts]
            if max(map(len, read)) > 0:
                cache, _ = self._engine.prefill(cache, None, read, empty=True)
            last = jnp.asarray([context[-1] for context in contexts], jnp.int32)
            drafter = ModelState(cache, last)
        return replace(state, speculation=self.step.init_state(drafter, len(contexts)))

    def step_tokens(self, state: DecodeState) -> tuple[int, ...]:
        """Steps of a row by the number of tokens that they emitted, from 0."""
        return tuple(np.asarray(state.speculation.emitted).sum(axis=0).tolist())
