"""`/v1/responses`: answers that are kept, so that the next request may go on from one of them."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from jaxinfer.serve.chat import Prepared, message_of
from jaxinfer.serve.context import Context
from jaxinfer.serve.errors import ApiError, Json, unsupported
from jaxinfer.serve.logprobs import entries
from jaxinfer.serve.response_schema import LOG_PROBS, ResponseRequest, chat_of, messages_of
from jaxinfer.serve.response_store import ResponseStore, Stored
from jaxinfer.serve.response_writer import Event, ResponseWriter
from jaxinfer.serve.schema import (
    AssistantMessage,
    CalledFunction,
    Instruction,
    Message,
    ToolCall,
)
from jaxinfer.serve.stream import Events
from jaxinfer.serve.tool_parser import Part, Text


class Responses:
    """The handlers, and the answers that they keep."""

    def __init__(self, most: int):
        self.store = ResponseStore(most)
        self._tasks: set[asyncio.Task[None]] = set()  # in the background

    async def create(
        self, context: Context, request: Request, body: ResponseRequest, owner: str
    ) -> Response:
        """Answers a request: as a whole, as a stream, or later."""
        self._check(body)
        messages = messages_of(body.input)
        if body.previous_response_id is not None:
            earlier = self.store.get(body.previous_response_id, owner, "previous_response_id")
            messages = [*_conversation(earlier), *messages]
        turns = messages
        if body.instructions is not None:
            turns = [Instruction(role="system", content=body.instructions), *messages]
        chat = chat_of(body, turns)
        prepared = await run_in_threadpool(Prepared.of, context, chat, owner)
        generation = await prepared.start(context)
        writer = ResponseWriter(_record(context, body))
        answer = _Answer(context, prepared, Stored(owner, writer, messages, generation), body)
        identifier = str(writer.record["id"])
        if body.store is not False and self.store.most:
            self.store.put(identifier, answer.stored)
        if body.stream:
            return Events(context, generation, answer.events(), named=True, ending=writer.fail)
        if body.background:
            task = asyncio.ensure_future(answer.run())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return Json(writer.record)
        try:
            await generation.watched(request, answer.whole())
        except BaseException:
            self.store.drop(identifier)
            raise
        return Json(writer.record)

    def _check(self, body: ResponseRequest) -> None:
        if body.store and not self.store.most:
            raise unsupported("store", "this server keeps no answers")
        if body.background and (body.stream or body.store is False or not self.store.most):
            what = "background needs store, and cannot be combined with stream"
            raise ApiError(400, what, param="background")
        if body.top_logprobs and LOG_PROBS not in (body.include or ()):
            what = f"top_logprobs need include: [{LOG_PROBS!r}]"
            raise ApiError(400, what, param="top_logprobs")

    async def retrieve(self, request: Request) -> Response:
        """A kept answer, as far as it is."""
        if request.query_params:
            raise unsupported(next(iter(request.query_params)))
        return Json(self._found(request).writer.record)

    async def cancel(self, request: Request) -> Response:
        """Ends an answer that is still being made."""
        found = self._found(request)
        if found.generation is not None:
            found.generation.close()
            found.writer.record["status"] = "cancelled"
        return Json(found.writer.record)

    async def delete(self, request: Request) -> Response:
        """Forgets an answer."""
        found, identifier = self._found(request), request.path_params["identifier"]
        if found.generation is not None:
            found.generation.close()
        self.store.drop(identifier)
        return Json({"id": identifier, "object": "response", "deleted": True})

    def _found(self, request: Request) -> Stored:
        owner = request.app.state.context.keys.owner(request)
        return self.store.get(request.path_params["identifier"], owner)


class _Answer:
    """One answer while it is made."""

    def __init__(self, context: Context, prepared: Prepared, stored: Stored, body: ResponseRequest):
        self.stored, self._context, self._parser = stored, context, prepared.parser()
        self._scores = LOG_PROBS in (body.include or ())
        self._parts: list[Part] = []
        self._log_probs: list[object] = []  # of tokens whose text is held back

    async def events(self) -> AsyncIterator[Event]:
        """What happens, as it happens."""
        writer, generation = self.stored.writer, self.stored.generation
        assert generation is not None
        try:
            for event in writer.begin():
                yield event
            async for _, piece in generation.pieces():
                parts = self._parser.push("" if piece is None else piece.text, last=piece is None)
                if piece is not None and self._scores:
                    self._log_probs += entries(self._context.vocabulary, piece)
                self._parts += parts
                for event in writer.write(parts, self._log_probs):
                    yield event
                if any(isinstance(part, Text) for part in parts):
                    self._log_probs = []
            answer = generation.tickets[0].completion
            assert answer is not None
            self._keep()
            for event in writer.end(answer.finish_reason, answer.stats):
                yield event
        finally:
            self.stored.generation = None
            if writer.record["status"] == "in_progress":  # its reader went away
                writer.record["status"] = "cancelled"

    async def whole(self) -> None:
        """Makes all of it."""
        async for _ in self.events():
            pass

    async def run(self) -> None:
        """Makes all of it in the background."""
        generation = self.stored.generation
        assert generation is not None
        with self._context.drain.request():
            try:
                await self.whole()
            except ApiError as error:
                self.stored.writer.fail(error)
            finally:
                generation.close()

    def _keep(self) -> None:
        """Adds the answer to the conversation."""
        text, calls = message_of(self._parts)
        made = [
            ToolCall(id=one.id, function=CalledFunction(name=one.name, arguments=arguments or "{}"))
            for one, arguments in calls
        ]
        content = text if text or not made else None
        message = AssistantMessage(role="assistant", content=content, tool_calls=made or None)
        self.stored.messages.append(message)


def _conversation(stored: Stored) -> list[Message]:
    """What was said up to an answer, and that.

    Raises:
      ApiError: 400, there is no whole answer.
    """
    status = stored.writer.record["status"]
    if status not in ("completed", "incomplete"):
        what = f"the previous response is {status}; go on from one that has ended"
        raise ApiError(400, what, param="previous_response_id")
    return stored.messages


def _record(context: Context, body: ResponseRequest) -> dict[str, object]:
    """The response object before there is an answer."""
    given = body.model_dump(by_alias=True, exclude_none=True)
    form = given.get("text", {}).get("format", {"type": "text"})
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": bool(body.background),
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": context.name,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "store": body.store is not False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": form},
        "tool_choice": given.get("tool_choice", "auto"),
        "tools": given.get("tools", []),
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }
