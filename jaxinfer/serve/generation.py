"""`Generation`: the tickets of one request, from the queue to the last of them.

Whatever ends a request early (its client goes, its time is up, one of its tickets fails) cancels
all of its tickets, which frees their slots within one round of steps.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from jaxinfer.decode.batcher import QueueFull
from jaxinfer.decode.slot_requests import Constraint
from jaxinfer.decode.ticket import Answer, Piece, RequestStats, Ticket
from jaxinfer.serve.context import Context
from jaxinfer.serve.errors import ApiError
from jaxinfer.serve.grammar import GrammarError
from jaxinfer.serve.options import Options

RETRY_S = 1
"""Seconds after which a client may ask a full server again."""


REASONS = {"eos": "stop"}
"""Why an answer ended, in the words of the API."""


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Generation:
    """The tickets of a request: `count` for each prompt, next to each other."""

    def __init__(self, context: Context, tickets: Sequence[Ticket], count: int):
        self._context, self.tickets, self.count = context, list(tickets), count
        self._deadline = time.monotonic() + context.config.timeout_s
        self._counted = False

    @classmethod
    async def start(
        cls,
        context: Context,
        prompts: Sequence[list[int]],
        opts: Options,
        count: int = 1,
        constraint: Callable[[], Constraint] | None = None,
    ) -> "Generation":
        """Submits everything, or nothing.

        Args:
          prompts: token ids.
          opts: of all tickets.
          count: answers to each prompt.
          constraint: makes what each of them must follow.

        Raises:
          ApiError: 429, the queue has no room; 503, the server is about to end; 400, the batcher
            refuses the request or could never hold it.
        """
        context.drain.check()
        batcher = context.batcher
        most, wanted = batcher.slots + batcher.queue, count * len(prompts)
        if wanted > most:
            raise ApiError(
                400, f"the request wants {wanted} answers, and {most} run or wait here at most; "
                "ask for fewer", param="n",
            )  # fmt: skip
        tickets: list[Ticket] = []

        def submit() -> None:
            for prompt in prompts:
                for sample in range(count):
                    own = None if constraint is None else constraint()
                    tickets.append(opts.submit(batcher, prompt, sample, own))

        try:
            await run_in_threadpool(submit)
        except BaseException as error:
            for ticket in tickets:
                ticket.cancel()
            raise _refusal(error) from error
        return cls(context, tickets, count)

    async def answers(self, request: Request) -> list[Answer]:
        """What all tickets have come to.

        Raises:
          ApiError: one of them failed, or they took too long.
          ClientGone: the client of the request went away.
        """
        await self.watched(request, self._exhaust())
        return [self.answer(i) for i in range(len(self.tickets))]

    async def watched(self, request: Request, work: Coroutine[Any, Any, None]) -> None:
        """Does what reads the pieces, while the client of the request waits for it.

        Raises:
          ClientGone: it does not any more.
        """
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientGone
            task.result()
        finally:
            task.cancel()
            gone.cancel()
            self.close()

    async def pieces(self) -> AsyncIterator[tuple[int, Piece | None]]:
        """The pieces of all tickets as they come, each with the number of its ticket; None is the
        end of one. The caller must `close` at the end.

        Raises:
          ApiError: a ticket failed, or they took too long.
        """
        waiting = {self._next(i): i for i in range(len(self.tickets))}
        try:
            while waiting:
                left = max(self._deadline - time.monotonic(), 0)
                done, _ = await asyncio.wait(
                    waiting, timeout=left, return_when=asyncio.FIRST_COMPLETED
                )
                if not done:
                    raise self._late()
                for task in done:
                    index = waiting.pop(task)
                    piece = task.result()
                    if piece is not None:
                        waiting[self._next(index)] = index
                    yield index, piece
        finally:
            for task in waiting:
                task.cancel()

    def answer(self, index: int) -> Answer:
        """What a ticket that has ended has come to.

        Raises:
          ApiError: it was cancelled, as the server ends.
        """
        found = self.tickets[index].completion
        assert found is not None
        if found.finish_reason == "cancelled":
            raise ApiError(503, "the server ended before the answer did", code="draining")
        return found

    def stats(self) -> list[RequestStats]:
        """What the tickets cost so far."""
        answers = [ticket.completion for ticket in self.tickets]
        return [answer.stats for answer in answers if answer is not None]

    def close(self) -> None:
        """Cancels what still runs, and counts what was made."""
        for ticket in self.tickets:
            if not ticket.done:
                ticket.cancel()
        if not self._counted:
            self._counted = True
            self._context.metrics.generated(self.stats())

    async def _exhaust(self) -> None:
        async for _ in self.pieces():
            pass

    def _next(self, index: int) -> "asyncio.Task[Piece | None]":
        return asyncio.ensure_future(self._piece(index))

    async def _piece(self, index: int) -> Piece | None:
        try:
            return await anext(self.tickets[index], None)
        except Exception as error:
            if not isinstance(error, GrammarError):
                self._context.log.fault(error)
            raise _failure(error) from error

    def _late(self) -> ApiError:
        seconds = self._context.config.timeout_s
        return ApiError(504, f"the answer took more than {seconds:g} seconds", code="timeout")


def usage_of(stats: Sequence[RequestStats], count: int = 1) -> dict[str, object]:
    """The tokens of a request with `count` answers to each prompt, whose tokens count once."""
    prompts = list(stats)[::count]
    prompt = sum(one.prompt_tokens for one in prompts)
    made = sum(one.new_tokens for one in stats)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in prompts)},
    }


def _refusal(error: BaseException) -> BaseException:
    """What a client is told when a submission fails."""
    if isinstance(error, QueueFull):
        return ApiError(429, error, code="queue_full", headers={"Retry-After": str(RETRY_S)})
    if isinstance(error, GrammarError):
        return _failure(error)
    if isinstance(error, ValueError):
        return ApiError(400, error)
    if isinstance(error, RuntimeError):  # the batcher is closed
        return ApiError(503, "the server is about to end; ask another one", code="draining")
    return error


def _failure(error: Exception) -> ApiError:
    if isinstance(error, GrammarError):
        return ApiError(422, error, code="invalid_grammar")
    kind = type(error).__name__
    return ApiError(500, f"the model failed ({kind}); the server goes on, ask again", code=kind)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
