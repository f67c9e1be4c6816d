"""What decoding needs of a draft: `Draft` is what `Options.draft` takes, `Plan` its part in a run.

`jaxinfer.speculative` has the drafts of this library; any other object with these methods serves.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jaxinfer.cache.policy import Policy
from jaxinfer.decode.engine import Engine
from jaxinfer.decode.loop import Step
from jaxinfer.decode.model import Model
from jaxinfer.decode.sampling import Sampler
from jaxinfer.decode.state import DecodeState


@runtime_checkable
class Planned(Protocol):
    """What a draft plans for: a `jaxinfer.decode.run.Run`, or the slots of a batcher."""

    @property
    def model(self) -> Model: ...

    @property
    def policy(self) -> Policy: ...

    @property
    def engine(self) -> Engine: ...

    @property
    def contexts(self) -> list[list[int]]:
        """The text of each row, which is continued."""
        ...

    @property
    def limits(self) -> list[int]:
        """Most new tokens of each row."""
        ...

    @property
    def samplers(self) -> list[Sampler]: ...

    @property
    def endless(self) -> bool: ...


@runtime_checkable
class Plan(Protocol):
    """The speculation of one run, which replaces the loop's plain step."""

    @property
    def step(self) -> Step:
        """The step, hashable: it is a static argument of the compiled loop."""
        ...

    @property
    def most(self) -> int:
        """Tokens that a step emits for a row, at most."""
        ...

    @property
    def engine(self) -> Engine:
        """The run's engine with the draft's parameters among its own."""
        ...

    def init_state(
        self, state: DecodeState, contexts: Sequence[list[int]] | None = None
    ) -> DecodeState:
        """The state with the draft's own, which has read the same text: the run's, or `contexts`,
        which are no longer."""
        ...

    def step_tokens(self, state: DecodeState, row: int | None = None) -> tuple[int, ...]:
        """Steps of a row, or of all rows, by the number of tokens that they emitted: 0, 1, ..."""
        ...


@runtime_checkable
class Draft(Protocol):
    """What guesses ahead of a model."""

    def plan(self, run: Planned) -> Plan | None:
        """The speculation of a run that is about to begin; None where it does not pay.

        Raises:
          ValueError: the draft does not fit the run's model or policy.
        """
        ...
