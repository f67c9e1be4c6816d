"""`PipelineReader`: a prompt on its way through the stages, piece by piece."""

import contextlib
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from jaxinfer.decode.engine import chunks
from jaxinfer.decode.request import Request
from jaxinfer.parallel.journal import Entry
from jaxinfer.parallel.message import Message
from jaxinfer.parallel.ring import StageLost
from jaxinfer.typing import Leaf

if TYPE_CHECKING:
    from jaxinfer.parallel.pipeline import Pipeline


class PipelineReader:
    """Reads a prompt, and begins anew in a ring that was repaired on the way."""

    def __init__(self, pipeline: "Pipeline", request: Request, entry: Entry):
        self._pipeline, self._request, self._entry = pipeline, request, entry
        self._incarnation, self._pieces = -1, [(0, 0)]
        self.log_probs: list[float] = []
        self.logits: Leaf = None  # f32[1, V] behind the last token, once finished

    @property
    def finished(self) -> bool:
        return not self._pieces

    def read(self) -> None:
        """Reads the next piece."""
        ring, entry = self._pipeline.ring, self._entry
        while True:
            if self._incarnation != ring.incarnation:
                self._incarnation = ring.incarnation
                self._pieces = pieces_of(self._pipeline, len(entry.prompt))
            try:
                logits = read_piece(self._pipeline, entry, entry.prompt, self._pieces[-1])
                break
            except StageLost:
                ring.repair()
        self._pieces.pop()
        if self.finished:
            self.logits, entry.made_in = jnp.asarray(logits), self._incarnation

    def drop(self) -> None:
        """Gives up what was read, of a request that gets no slot."""
        self._pipeline.journal.close(self._request)
        with contextlib.suppress(StageLost):  # who needs the ring next repairs it, and all is gone
            self._pipeline.ring.send(Message("drop", {"request": self._entry.number}))


def pieces_of(pipeline: "Pipeline", length: int) -> list[tuple[int, int]]:
    """The pieces in which so many tokens are read, the first one last."""
    return list(reversed(chunks(length, pipeline.piece)))


def read_piece(
    pipeline: "Pipeline", entry: Entry, tokens: list[int], piece: tuple[int, int]
) -> np.ndarray:
    """The logits f32[1, V] behind a piece of a row's tokens."""
    first, size = piece
    part = tokens[first : first + size]
    x = np.zeros((1, size), np.int32)
    x[0, : len(part)] = part
    fields = {
        "request": entry.number, "count": len(part), "position": first,
        "prompt": len(entry.prompt),
    }  # fmt: skip
    pipeline.ring.send(Message("prefill", fields, (x,)))
    return pipeline.ring.receive().arrays[0][:, 0]
