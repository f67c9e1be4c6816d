"""`PipelineBatch`: the rows that run in a pipeline, in groups that follow each other through it.

As many groups are on their way at once as there are stages. Every group draws for itself when its
logits come, and goes on at once. A group whose caches were lost is made again from the journal when
it is needed next: prompts and what was drawn since are read through all stages, and the rows go on
where they were.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxinfer.decode.loop import sample_token
from jaxinfer.decode.request import Request
from jaxinfer.decode.slot_batch import Emitted
from jaxinfer.decode.slot_requests import Kind, of_kind
from jaxinfer.decode.slots import Row, slot_programs
from jaxinfer.decode.state import DecodeState, Requests
from jaxinfer.parallel.message import Message
from jaxinfer.parallel.pipeline_reader import pieces_of, read_piece
from jaxinfer.parallel.ring import StageLost
from jaxinfer.runtime.program import Program

if TYPE_CHECKING:
    from jaxinfer.parallel.pipeline import Pipeline


class _Group:
    """Rows that step together. `state` is what is drawn, without caches; None before the first."""

    def __init__(self, number: int, rows: int):
        self.number = number
        self.owners: list[Request | None] = [None] * rows
        self.row: Row | None = None
        self.made_in = -1  # the incarnation whose caches hold the rows

    @property
    def running(self) -> list[int]:
        """The rows that are not done."""
        assert self.row is not None
        done = np.asarray(self.row.state.done)
        return [i for i, owner in enumerate(self.owners) if owner is not None and not done[i]]


class PipelineBatch:
    """The rows of a `Pipeline`, each in a slot of a group."""

    def __init__(self, pipeline: "Pipeline"):
        self._pipeline, self._ring, self._journal = pipeline, pipeline.ring, pipeline.journal
        self._programs = slot_programs(pipeline.engine)
        if "draw" not in self._programs:
            self._programs["draw"] = Program(draw, donate_argnames=("state",), name="draw")
        self._groups = [_Group(i, pipeline.rows) for i in range(pipeline.groups)]

    @property
    def owners(self) -> dict[Request, int]:
        """The slot of each owner."""
        found = [owner for group in self._groups for owner in group.owners]
        return {owner: i for i, owner in enumerate(found) if owner is not None}

    @property
    def slots(self) -> int:
        """Slots that there are."""
        return len(self._groups) * self._pipeline.rows

    def add(self, owner: Request, row: Row) -> None:
        """Puts a row whose prompt was read into the group that has the most room."""
        row = row._replace(requests=of_kind(row.requests, Kind.GREEDY))
        group = max(self._groups, key=lambda one: one.owners.count(None))
        place = group.owners.index(None)
        entry = self._journal.of(owner)
        entry.emitted = [int(np.asarray(row.state.token)[0])]
        if group.row is None:
            order = jnp.asarray([-1] * len(group.owners), jnp.int32).at[place].set(0)
            group.row = Row(*self._programs["resize"](row.state, row.requests, order))
        else:
            inserted = self._programs["insert"](*group.row, row, jnp.int32(place))
            group.row = Row(*inserted)
        group.owners[place] = owner
        try:
            if group.made_in == self._ring.incarnation:
                self._place(group, place)
            else:
                self._sync(group)
        except StageLost:
            group.made_in = -1  # made again when it runs

    def remove(self, owner: Request) -> None:
        """Empties the owner's slot."""
        group, place = self._of(owner)
        group.owners[place] = None
        self._journal.close(owner)
        if not any(group.owners):
            group.row = None
        elif group.row is not None:
            state = self._programs["free"](group.row.state, jnp.int32(place))
            group.row = group.row._replace(state=state)
        if group.made_in == self._ring.incarnation:
            try:
                self._ring.send(Message("free", {"group": group.number, "row": place}))
            except StageLost:
                group.made_in = -1

    def allow(self, owner: Request, words: np.ndarray) -> None:
        """Sets the mask of tokens that the owner may draw next."""
        group, place = self._of(owner)
        assert group.row is not None
        allow, requests = self._programs["allow"], group.row.requests
        requests = allow(requests, jnp.asarray(words), jnp.int32(place))
        group.row = group.row._replace(requests=requests)

    def run(self, steps: int, kind: Kind) -> Emitted:
        """At most `steps` steps of every group, whatever is lost on the way."""
        left = {group: steps for group in self._groups if any(group.owners)}
        while True:
            try:
                self._run(left, kind)
                break
            except StageLost:
                self._ring.repair()
        return self._emitted(kind)

    def settle(self) -> None:
        """The slots stay as they are."""

    def clear(self) -> None:
        """Forgets all rows."""
        for owner in self.owners:
            self._journal.close(owner)
        self._groups = [_Group(i, self._pipeline.rows) for i in range(self._pipeline.groups)]

    def _run(self, left: dict[_Group, int], kind: Kind) -> None:
        for group in left:
            self._sync(group)
        flying = {}
        for group in left:
            if left[group] and self._send(group):
                flying[group.number] = group
        while flying:
            message = self._ring.receive()
            group = flying.pop(message.fields["group"])
            self._draw(group, message.arrays[0], kind)
            left[group] -= 1
            if left[group] and self._send(group):
                flying[group.number] = group

    def _send(self, group: _Group) -> bool:
        """Sends the running rows' last tokens on their way; whether there are any."""
        running = group.running
        if not running or group.row is None:
            return False
        tokens = np.asarray(group.row.state.token)[:, None]
        self._step(group, tokens, running, [self._entry(group, i).cached for i in running])
        return True

    def _step(
        self, group: _Group, tokens: np.ndarray, rows: list[int], positions: list[int]
    ) -> None:
        fields = {"group": group.number, "active": rows, "positions": positions}
        self._ring.send(Message("step", fields, (tokens,)))

    def _draw(self, group: _Group, logits: np.ndarray, kind: Kind) -> None:
        assert group.row is not None
        running, requests = group.running, of_kind(group.row.requests, kind)
        state = self._programs["draw"](requests, group.row.state, jnp.asarray(logits))
        group.row = group.row._replace(state=state)
        self._pipeline.draws += 1
        tokens = np.asarray(state.token)
        for row in running:  # a row that is not done emits one
            self._entry(group, row).emitted.append(int(tokens[row]))

    def _sync(self, group: _Group) -> None:
        """Makes all rows of a group again if the ring is another one."""
        if group.made_in == self._ring.incarnation:
            return
        incarnation = self._ring.incarnation
        for row, owner in enumerate(group.owners):
            if owner is not None:
                self._place(group, row)
        group.made_in = incarnation

    def _place(self, group: _Group, row: int) -> None:
        """Puts what was read of a row's text into its caches; reads it first where that is lost.

        What was drawn is read like a prompt if the policy gives the same caches then, else token by
        token as it was before.
        """
        entry = self._entry(group, row)
        later: list[int] = []
        if entry.made_in != self._ring.incarnation:
            drawn = entry.emitted[:-1]
            tokens = entry.prompt
            if self._pipeline.policy.chunk_invariant:
                tokens = tokens + drawn
            else:
                later = drawn
            for piece in reversed(pieces_of(self._pipeline, len(tokens))):
                read_piece(self._pipeline, entry, tokens, piece)
        entry.made_in = -1  # the stages hand it over
        fields = {"request": entry.number, "group": group.number, "row": row}
        self._ring.send(Message("insert", fields))
        for i, token in enumerate(later):
            x = np.full((len(group.owners), 1), token, np.int32)
            self._step(group, x, [row], [len(entry.prompt) + i])
            self._ring.receive()

    def _entry(self, group: _Group, row: int):
        owner = group.owners[row]
        assert owner is not None
        return self._journal.of(owner)

    def _of(self, owner: Request) -> tuple[_Group, int]:
        return next((g, g.owners.index(owner)) for g in self._groups if owner in g.owners)

    def _emitted(self, kind: Kind) -> Emitted:
        """What all slots have; those of a group without rows are empty."""
        parts: list[Emitted | None] = [
            None if group.row is None else Emitted.of(group.row.state, kind)
            for group in self._groups
        ]
        known = next(one for one in parts if one is not None)
        nothing = Emitted(*_zeros(known))
        filled = [nothing if one is None else one for one in parts]
        arrays = [np.concatenate(some) for some in list(zip(*filled, strict=True))[:4]]
        listed = None
        if known.likeliest is not None:
            pairs = [one.likeliest for one in filled if one.likeliest is not None]
            listed = tuple(np.concatenate(some) for some in zip(*pairs, strict=True))
        return Emitted(*arrays, listed)  # type: ignore[arg-type]


def draw(requests: Requests, state: DecodeState, logits: Float[Array, "B 1 V"]) -> DecodeState:
    """The state after every row that is not done has drawn a token."""
    state, _ = sample_token(requests, state, logits[:, 0])
    return replace(state, steps=state.steps + 1)


def _zeros(emitted: Emitted) -> list:
    listed = emitted.likeliest
    pair = None if listed is None else tuple(np.zeros_like(x) for x in listed)
    return [*(np.zeros_like(x) for x in emitted[:4]), pair]
