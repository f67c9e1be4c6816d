"""Answers as server-sent events: `data: {...}` lines that end with `data: [DONE]`."""

from collections.abc import AsyncIterator, Callable

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Receive, Scope, Send

from jaxinfer.serve.context import Context
from jaxinfer.serve.errors import ApiError, json_text
from jaxinfer.serve.generation import Generation

PING_S = 15  # seconds between two signs of life
LINE = "\n"


class Events(EventSourceResponse):
    """A stream of JSON events. However it ends, the generation is closed: at its end, when the
    client goes, or when it reads too slowly.

    Args:
      records: the events.
      ending: makes of an error that comes late the last events.
    """

    def __init__(
        self,
        context: Context,
        generation: Generation,
        records: AsyncIterator[dict[str, object]],
        *,
        named: bool = False,
        ending: Callable[[ApiError], list[dict[str, object]]] | None = None,
    ):
        self._context, self._generation, self._records = context, generation, records
        self._named, self._ending = named, ending or (lambda error: [error.record()])
        super().__init__(self._events(), sep=LINE, ping=PING_S, send_timeout=context.config.send_s)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except TimeoutError:  # of a reader that is too slow: there is nobody to tell
            self._context.metrics.refused("slow_reader")
        finally:
            self._generation.close()

    async def _events(self) -> AsyncIterator[ServerSentEvent]:
        try:
            async for record in self._records:
                yield self._event(record)
        except ApiError as error:
            self._context.metrics.refused(error.code or str(error.status))
            for record in self._ending(error):
                yield self._event(record)
        except Exception as error:
            self._context.log.fault(error)
            for record in self._ending(ApiError(500, "the server failed", code="fault")):
                yield self._event(record)
        if not self._named:
            yield ServerSentEvent("[DONE]", sep=LINE)

    def _event(self, record: dict[str, object]) -> ServerSentEvent:
        name = str(record["type"]) if self._named else None
        return ServerSentEvent(json_text(record), event=name, sep=LINE)
