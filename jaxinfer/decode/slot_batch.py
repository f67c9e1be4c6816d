"""`SlotBatch`: the rows that run, in as few slots as hold them."""

from collections.abc import Hashable
from typing import Generic, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np

from jaxinfer.cache.policy import Cache
from jaxinfer.decode.engine import Engine
from jaxinfer.decode.loop import Step
from jaxinfer.decode.slot_requests import Kind, of_kind
from jaxinfer.decode.slots import Row, slot_programs
from jaxinfer.decode.state import DecodeState

Owner = TypeVar("Owner", bound=Hashable)

PATIENCE = 16  # rounds that half of the slots stay empty before they are given up


class Emitted(NamedTuple):
    """What the host reads of a state after a round; M tokens are remembered, C are listed."""

    tokens: np.ndarray  # i32[B, M]
    log_probs: np.ndarray  # f32[B, M]
    written: np.ndarray  # i32[B]
    done: np.ndarray  # bool[B]
    likeliest: tuple[np.ndarray, np.ndarray] | None  # tokens and log-probabilities [B, M, C]

    @classmethod
    def of(cls, state: DecodeState, kind: Kind) -> "Emitted":
        found = None
        if kind is Kind.EVERYTHING:
            found = np.asarray(state.likeliest.tokens), np.asarray(state.likeliest.log_probs)
        return cls(
            tokens=np.asarray(state.tokens),
            log_probs=np.asarray(state.log_probs),
            written=np.asarray(state.written),
            done=np.asarray(state.done),
            likeliest=found,
        )


class SlotBatch(Generic[Owner]):
    """The rows that run, each in a slot; there are 1, 2, 4, ... of these, so that a lone row does
    not pay for more. A state of one row is the first row itself.

    After an error of the device the state may be lost: `clear` forgets it.

    Args:
      engine: what decodes, with a draft's parameters among its own.
      step: the step of the loop.
      most: slots at most, a power of two.
    """

    def __init__(self, engine: Engine, step: Step, most: int):
        self.engine, self.step, self.most = engine, step, most
        self._programs = slot_programs(engine)
        self._row: Row | None = None  # the state and the requests of all slots
        self._owners: list[Owner | None] = []
        self._roomy = 0  # rounds since when half of the slots are empty

    @property
    def owners(self) -> dict[Owner, int]:
        """The slot of each owner."""
        return {owner: i for i, owner in enumerate(self._owners) if owner is not None}

    @property
    def slots(self) -> int:
        """Slots that there are now."""
        return len(self._owners)

    @property
    def state(self) -> DecodeState:
        assert self._row is not None, "the batch is empty"
        return self._row.state

    def add(self, owner: Owner, row: Row) -> None:
        """Puts a row into a slot; its arrays must not be used any more."""
        row = row._replace(requests=of_kind(row.requests, Kind.GREEDY))
        if self._row is None:
            self._row, self._owners = row, [owner]
            return
        if None not in self._owners:
            self._resize(2 * self.slots)
        slot = self._owners.index(None)
        state, requests = self._row
        self._row = Row(*self._programs["insert"](state, requests, row, jnp.int32(slot)))
        self._owners[slot] = owner

    def remove(self, owner: Owner) -> None:
        """Empties the owner's slot; without owners there is no state."""
        slot = self._owners.index(owner)
        self._owners[slot] = None
        if not any(one is not None for one in self._owners):
            self.clear()
        elif self._row is not None:
            state = self._programs["free"](self._row.state, jnp.int32(slot))
            self._row = self._row._replace(state=state)

    def cache_of(self, owner: Owner, length: int) -> Cache:
        """A copy of the owner's row, cut to `length` tokens."""
        slot = jnp.int32(self._owners.index(owner))
        return self._programs["row_of"](self.state.cache, slot, jnp.int32(length))

    def allow(self, owner: Owner, words: np.ndarray) -> None:
        """Sets the mask of tokens that the owner may draw next."""
        assert self._row is not None
        slot = jnp.int32(self._owners.index(owner))
        requests = self._programs["allow"](self._row.requests, jnp.asarray(words), slot)
        self._row = self._row._replace(requests=requests)

    def run(self, steps: int, kind: Kind) -> Emitted:
        """At most `steps` steps of the program of a kind."""
        assert self._row is not None
        requests = of_kind(self._row.requests, kind)
        state = self.engine.decode(requests, self._row.state, steps, self.step)
        self._row = self._row._replace(state=state)
        return Emitted.of(state, kind)

    def settle(self) -> None:
        """Gives slots up when half of them were empty for a while."""
        self._roomy = self._roomy + 1 if 2 * len(self.owners) <= self.slots else 0
        if self._roomy >= PATIENCE:
            self.give_up()

    def give_up(self) -> None:
        """Halves the slots if the other half is empty."""
        if self.slots > 1 and 2 * len(self.owners) <= self.slots:
            self._resize(self.slots // 2)

    def clear(self) -> None:
        """Forgets all rows."""
        self._row, self._owners, self._roomy = None, [], 0

    def _resize(self, slots: int) -> None:
        assert self._row is not None and slots <= self.most
        kept = list(self.owners.values())
        order = kept + [-1] * (slots - len(kept))
        owners = [None if i < 0 else self._owners[i] for i in order]
        state, requests = self._row
        moved = self._programs["resize"](state, requests, jnp.asarray(order, jnp.int32))
        self._row, self._owners, self._roomy = Row(*moved), owners, 0
