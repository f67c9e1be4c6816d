"""`Scheduler`: which request is read and which rows run, turn by turn; it knows no threads.

First come, first served: a request is admitted when a slot is free, and so is the memory, which all
slots have from the beginning. A turn reads one piece of one prompt and then decodes a few steps of
all rows, so that texts go on while a long prompt is read.
"""

import time
from collections import deque

from jaxinfer.decode.request import Request
from jaxinfer.decode.servable import Reader, Servable
from jaxinfer.decode.slot_batch import Emitted


class Scheduler:
    """The requests of one `Servable`; an error ends those that it concerns, and nothing else."""

    def __init__(self, serving: Servable):
        self.serving, self.batch = serving, serving.batch()
        self.waiting: deque[Request] = deque()
        self._reading: Request | None = None
        self._reader: Reader | None = None  # of that

    @property
    def idle(self) -> bool:
        return not (self.waiting or self._reading or self.batch.owners)

    @property
    def running(self) -> int:
        """Requests that have a slot, or are about to."""
        return len(self.batch.owners) + (self._reading is not None)

    def turn(self) -> None:
        """Drops what was cancelled, reads a piece of a prompt, and decodes a few steps."""
        for request in [one for one in list(self.waiting) if one.ticket.cancelled]:
            self.waiting.remove(request)
            request.end("cancelled")
        try:
            self._read()
        except Exception as error:
            self._stop_reading("error", error)
        try:
            self._decode()
        except Exception as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """Ends all that have a slot: their state may be lost."""
        owners = list(self.batch.owners)
        self.batch.clear()
        for request in owners:
            if not request.ticket.done:
                request.end(error=error)

    def abandon(self, error: Exception) -> None:
        """Ends everything."""
        self.fail(error)
        self._stop_reading("error", error)
        while self.waiting:
            self.waiting.popleft().end(error=error)

    def _read(self) -> None:
        if self._reading is None:
            if not self.waiting or len(self.batch.owners) == self.serving.slots:
                return
            self._reading = self.waiting.popleft()
            self._reading.clock.admitted = time.perf_counter()
            self._reader = self.serving.reader(self._reading)
        request, reader = self._reading, self._reader
        assert reader is not None
        if request.ticket.cancelled:
            self._stop_reading("cancelled")
            return
        with request.clock.reading():
            reader.read()
        if reader.finished:
            self._start(request, reader)

    def _stop_reading(self, reason: str, error: Exception | None = None) -> None:
        request, reader, self._reading, self._reader = self._reading, self._reader, None, None
        if reader is not None:
            reader.drop()
        if request is not None:
            request.end(reason, error)

    def _start(self, request: Request, reader: Reader) -> None:
        """Draws the first token behind a prompt; a row that has more to come gets a slot."""
        if request.extras.prompt_log_probs:
            request.prompt_log_probs = reader.log_probs
        with request.clock.reading():
            row = self.serving.row(request, reader)
        ended = request.take(Emitted.of(row.state, request.kind), 0)
        self._reading = self._reader = None
        if ended:
            reader.drop()
            request.end()
            return
        try:
            self.batch.add(request, row)
        except Exception as error:
            request.end(error=error)
            self.fail(error)

    def _decode(self) -> None:
        batch = self.batch
        for request in list(batch.owners):
            if request.ticket.cancelled:
                self._leave(request, "cancelled")
        owners = batch.owners
        if not owners:
            return
        bound = [request for request in owners if request.one_by_one]
        for request in bound:
            batch.allow(request, request.mask)
        kind = max(request.kind for request in owners)
        emitted = batch.run(1 if bound else self.serving.steps, kind)
        for request, slot in owners.items():
            try:
                ended = request.take(emitted, slot)
            except Exception as error:  # of its constraint
                self._leave(request, error=error)
                continue
            if ended:
                self._leave(request)
        batch.settle()

    def _leave(
        self, request: Request, reason: str | None = None, error: Exception | None = None
    ) -> None:
        try:
            self.serving.leaves(request, self.batch)
            self.batch.remove(request)
        finally:  # what fails here is a matter of the others
            request.end(reason, error)
