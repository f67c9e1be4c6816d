"""`SpeculativeRun`: what speculation adds to one run, checked before anything is compiled."""

import warnings
from collections.abc import Sequence
from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from jaxinfer.cache.policy import Policy
from jaxinfer.cache.presets import full
from jaxinfer.decode.capacity import capacity_for, check_fits
from jaxinfer.decode.engine import Engine, bucket
from jaxinfer.decode.model import Model
from jaxinfer.decode.speculation import Planned
from jaxinfer.decode.state import DecodeState
from jaxinfer.models.recurrent import RecurrentDraft
from jaxinfer.speculative.drafters import Drafter, ModelState
from jaxinfer.speculative.lookup import LookupState
from jaxinfer.speculative.step import TreeStep
from jaxinfer.speculative.topology import Topology
from jaxinfer.typing import Leaf


class SpeculativeRun:
    """The speculation of one run, `jaxinfer.decode.speculation.Plan`.

    Args:
        run: what is about to begin.
        topology: the tree of its steps.
        drafter: what fills the tree.
        draft: the drafter's model; None is prompt lookup.
        policy: the draft's cache policy; None keeps everything.

    Raises:
        ValueError: the drafter cannot fill the tree, or the draft's cache does not fit.
    """

    def __init__(
        self,
        run: Planned,
        topology: Topology,
        drafter: Drafter,
        draft: Model | RecurrentDraft | None,
        policy: Policy | None = None,
    ):
        drafter.check(topology)
        if not run.policy.lossless_under_tree:
            warnings.warn(
                f"policy {run.policy.name!r} decides what to keep after every token; with several "
                "tokens per step the text may differ from plain decoding's",
                stacklevel=4,
            )
        if draft is None and run.endless:
            raise ValueError(
                "prompt lookup remembers the whole text; give max_new_tokens, or a draft model"
            )
        self.run = run
        self.step = TreeStep(topology=topology, drafter=drafter)
        self.most = topology.levels
        self._room = bucket(max(map(len, run.contexts)) + max(run.limits), 64)
        self.engine: Engine = run.engine
        self._reader: _Reader | None = None
        self._draft = draft
        if isinstance(draft, Model):
            self._reader = _Reader(run, draft, policy)
            draft_params = self._reader.engine.params
        elif draft is not None:
            draft_params = draft.params
        else:
            return
        self.engine = replace(run.engine, params=run.engine.params | {"draft": draft_params})

    def init_state(
        self, state: DecodeState, contexts: Sequence[list[int]] | None = None
    ) -> DecodeState:
        """The state with the draft's, which has read the same text."""
        contexts = self.run.contexts if contexts is None else contexts
        if self._reader is not None:
            drafter: Leaf = self._reader.state(contexts)
        elif isinstance(self._draft, RecurrentDraft):
            drafter = jnp.zeros((len(contexts), self._draft.config.hidden_size), jnp.float32)
        else:
            drafter = _lookup_state(contexts, self._room, state)
        return replace(state, speculation=self.step.init_state(drafter, len(contexts)))

    def step_tokens(self, state: DecodeState, row: int | None = None) -> tuple[int, ...]:
        """Steps of a row, or of all, by the number of tokens that they emitted, from 0."""
        emitted = np.asarray(state.speculation.emitted)
        return tuple((emitted.sum(axis=0) if row is None else emitted[row]).tolist())


class _Reader:
    """A draft model's own cache of a run's text."""

    def __init__(self, run: Planned, draft: Model, policy: Policy | None):
        context = max(map(len, run.contexts))
        if policy is None:
            policy = run.policy if run.endless and run.policy.feature_maps is None else full()
        self.policy = policy.sized(bucket(context, 64))
        self.capacity = capacity_for(draft, self.policy, context, max(run.limits))
        check_fits(draft, self.policy, len(run.contexts), self.capacity, context)
        self.engine = draft.engine.serving(self.policy)

    def state(self, contexts: Sequence[list[int]]) -> ModelState:
        """All but each row's last token read."""
        lengths = list(map(len, contexts))
        cache = self.engine.new_cache(self.policy, len(contexts), self.capacity, contexts=lengths)
        read = [context[:-1] for context in contexts]
        if max(map(len, read)) > 0:
            cache, _ = self.engine.prefill(cache, None, read, empty=True)
        return ModelState(cache, jnp.asarray([context[-1] for context in contexts], jnp.int32))


def _lookup_state(contexts: Sequence[list[int]], room: int, state: DecodeState) -> LookupState:
    """Each row's text with the token that was drawn behind it, in room for `room` tokens."""
    lengths = np.array([len(context) for context in contexts], np.int32)
    history = np.zeros((len(contexts), room), np.int32)
    for row, context in zip(history, contexts, strict=True):
        row[: len(context)] = context
    history[np.arange(len(contexts)), lengths] = np.asarray(state.token)
    return LookupState(jnp.asarray(history), jnp.asarray(lengths + 1))
