"""What a scheduler needs of what it serves with: `jaxinfer.decode.serving.Serving` on the device of
this process, or a pipeline of processes (`jaxinfer.parallel.pipeline`)."""

from typing import Protocol, runtime_checkable

import numpy as np

from jaxinfer.cache.policy import Policy
from jaxinfer.decode.model import Model
from jaxinfer.decode.request import Request
from jaxinfer.decode.slot_batch import Emitted
from jaxinfer.decode.slot_requests import Kind
from jaxinfer.decode.slots import Row


@runtime_checkable
class Reader(Protocol):
    """A prompt on its way into a cache."""

    log_probs: list[float]

    @property
    def finished(self) -> bool: ...

    def read(self) -> None:
        """Reads the next piece."""
        ...

    def drop(self) -> None:
        """Gives up what was read, of a request that gets no slot."""
        ...


@runtime_checkable
class Batch(Protocol):
    """The rows that run."""

    @property
    def owners(self) -> dict[Request, int]: ...

    @property
    def slots(self) -> int: ...

    def add(self, owner: Request, row: Row) -> None: ...

    def remove(self, owner: Request) -> None: ...

    def allow(self, owner: Request, words: np.ndarray) -> None: ...

    def run(self, steps: int, kind: Kind) -> Emitted: ...

    def settle(self) -> None: ...

    def clear(self) -> None: ...


@runtime_checkable
class Servable(Protocol):
    """A model behind slots; see `Serving` for what its attributes mean."""

    model: Model
    policy: Policy  # how its caches keep tokens
    slots: int  # rows at once, at most
    context: int  # tokens of a row
    steps: int  # between two looks at what came
    row_bytes: int  # of a row's caches

    @property
    def programs(self) -> dict[str, int]: ...

    @property
    def prefix_bytes(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def batch(self) -> Batch: ...

    def reader(self, request: Request) -> Reader: ...

    def row(self, request: Request, reader: object) -> Row: ...

    def leaves(self, request: Request, batch: object) -> None:
        """Is told of a row before it leaves its slot."""
        ...

    def check_room(self, request: Request) -> None: ...

    def warm(self) -> None:
        """Compiles whatever requests may need."""
        ...

    def close(self) -> None:
        """Ends what serves beside this process."""
        ...
