"""`Drain`: how a server ends. What runs goes on for a while, what is new is refused."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from jaxinfer.serve.errors import ApiError


class Drain:
    """The requests in flight, and whether more may come. Used by the event loop alone.

    Args:
      seconds: for which what runs may go on.
    """

    def __init__(self, seconds: float):
        self.seconds, self.draining, self.running = seconds, False, 0
        self._changed = asyncio.Event()

    def check(self) -> None:
        """Raises a 503 once the server is to end."""
        if self.draining:
            raise ApiError(
                503, "the server is about to end; ask another one, or later", code="draining",
                headers={"Retry-After": str(max(1, round(self.seconds)))},
            )  # fmt: skip

    @contextmanager
    def request(self) -> Iterator[None]:
        """One request in flight."""
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            self._changed.set()

    async def wait(self) -> bool:
        """Refuses what is new and waits for what runs; whether all of it has ended in time."""
        self.draining = True
        try:
            async with asyncio.timeout(self.seconds):
                while self.running:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True
