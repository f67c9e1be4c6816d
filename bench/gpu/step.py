"""A step of a part: what its row is called, what may run beside others, what must run alone."""

from collections.abc import Callable
from typing import Any, Protocol


class Step(Protocol):
    config: dict[str, Any]

    def prepare(self) -> dict[str, Any] | None:
        """Compiles; several steps at a time. Returns metrics only where there is nothing to run."""
        ...

    def run(self) -> dict[str, Any]:
        """The metrics; alone on the device."""
        ...

    def drop(self) -> None:
        """Gives up memory."""
        ...


class Plain:
    """A step that is one function."""

    def __init__(self, config: dict[str, Any], function: Callable[[], dict[str, Any]]):
        self.config, self.run = config, function

    def prepare(self) -> None:
        pass

    def drop(self) -> None:
        pass
