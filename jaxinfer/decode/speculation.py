"""What decoding needs of a draft: `Draft` is what `Options.draft` takes, `Plan` its part in a run.

`jaxinfer.speculative` has the drafts of this library; any other object with these methods serves.
"""

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from jaxinfer.decode.engine import Engine
from jaxinfer.decode.loop import Step
from jaxinfer.decode.state import DecodeState

if TYPE_CHECKING:
    from jaxinfer.decode.run import Run


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

    def init_state(self, state: DecodeState) -> DecodeState:
        """The state with the draft's own, which has read the same text."""
        ...

    def step_tokens(self, state: DecodeState) -> tuple[int, ...]:
        """Steps of a row by the number of tokens that they emitted: 0, 1, 2, ..."""
        ...


@runtime_checkable
class Draft(Protocol):
    """What guesses ahead of a model."""

    def plan(self, run: "Run") -> Plan | None:
        """The speculation of a run that is about to begin; None where it does not pay.

        Raises:
          ValueError: the draft does not fit the run's model or policy.
        """
        ...
