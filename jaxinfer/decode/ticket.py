"""`Ticket`: one request of a batcher, seen from outside."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from jaxinfer.decode.results import Completion, Stats


class Piece(NamedTuple):
    """What one round added to a text. `text` may be empty: a character or a stop string is not
    whole yet. `likeliest` has, for each token, as many pairs (token, log-probability) as
    `top_logprobs` asked for, the likeliest first."""

    text: str
    tokens: list[int]
    log_probs: list[float]
    likeliest: list[list[tuple[int, float]]]


@dataclass(frozen=True, kw_only=True)
class RequestStats(Stats):
    """What one request cost; seconds are of the clock, and others share them.

    `queue_s` is the time before its prompt was read, `first_token_s` that from its submission to
    its first token, and `cached_tokens` are those of its prompt that need not be read."""

    queue_s: float
    first_token_s: float
    cached_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Answer(Completion):
    """A completion of a batcher: `finish_reason` may also be "error". `likeliest` as in `Piece`.
    `prompt_log_probs` are those of the prompt's tokens but the first, where they were asked for."""

    stats: RequestStats
    likeliest: list[list[tuple[int, float]]]
    prompt_log_probs: list[float] | None


class Ticket(Iterator[Piece], AsyncIterator[Piece]):
    """One request: its pieces as they are made, by `for` or `async for`, and its completion.

    A reader that is slow stops nobody; what it has not read yet waits for it. `cancel` ends the
    request and frees its place. Iteration and `result` raise what went wrong, if something did.
    """

    def __init__(self):
        self._changed = threading.Condition()
        self._pieces: list[Piece] = []
        self._read = 0  # pieces that the reader has
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self._cancelled = False
        self._stats: RequestStats | None = None  # None before the first piece
        self._prompt_log_probs: list[float] | None = None
        self._reason: str | None = None  # why it ended
        self._error: Exception | None = None

    def __iter__(self) -> "Ticket":
        return self

    def __next__(self) -> Piece:
        with self._changed:
            self._changed.wait_for(lambda: self._has_news)
            return self._next(StopIteration)

    def __aiter__(self) -> "Ticket":
        return self

    async def __anext__(self) -> Piece:
        while True:
            with self._changed:
                if self._has_news:
                    return self._next(StopAsyncIteration)
                loop = asyncio.get_running_loop()
                waiter = loop.create_future()
                self._waiting.append((loop, waiter))
            await waiter

    def cancel(self) -> None:
        """Ends the request; what was made so far stays in `completion`."""
        self._cancelled = True

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled

    @property
    def done(self) -> bool:
        """Whether it has ended, in whatever way."""
        return self._reason is not None

    @property
    def completion(self) -> Answer | None:
        """What was made so far; None before the first token. Its `finish_reason` is "cancelled"
        until the request has ended."""
        with self._changed:
            return self._completion()

    def result(self, timeout: float | None = None) -> Answer:
        """Waits for the end.

        Args:
          timeout: seconds to wait at most; None is for ever.

        Raises:
          TimeoutError: it has not ended by then.
          Exception: what ended it, if that was an error.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"the request has not ended within {timeout} seconds")
            if self._error is not None:
                raise self._error
            answer = self._completion()
            assert answer is not None
            return answer

    # What the batcher's thread tells it.

    def push(
        self, piece: Piece, stats: RequestStats, prompt_log_probs: list[float] | None = None
    ) -> None:
        """What one round added."""
        with self._changed:
            if piece.tokens or piece.text:
                self._pieces.append(piece)
            self._stats, self._prompt_log_probs = stats, prompt_log_probs
            self._wake()

    def end(self, reason: str, stats: RequestStats, error: Exception | None = None) -> None:
        """That it is over, and why."""
        with self._changed:
            self._reason, self._stats, self._error = reason, stats, error
            self._wake()

    @property
    def _has_news(self) -> bool:
        return self._read < len(self._pieces) or self.done

    def _next(self, end: type[Exception]) -> Piece:
        if self._read < len(self._pieces):
            self._read += 1
            return self._pieces[self._read - 1]
        raise end if self._error is None else self._error

    def _completion(self) -> Answer | None:
        if self._stats is None:
            return None
        pieces = self._pieces
        return Answer(
            text="".join(piece.text for piece in pieces),
            tokens=[token for piece in pieces for token in piece.tokens],
            log_probs=[x for piece in pieces for x in piece.log_probs],
            likeliest=[x for piece in pieces for x in piece.likeliest],
            finish_reason=self._reason or "cancelled",
            prompt_log_probs=self._prompt_log_probs,
            stats=self._stats,
        )

    def _wake(self) -> None:
        self._changed.notify_all()
        waiting, self._waiting = self._waiting, []
        for loop, waiter in waiting:
            try:
                loop.call_soon_threadsafe(_set, waiter)
            except RuntimeError:  # the loop is closed, and nobody waits any more
                continue


def _set(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)
