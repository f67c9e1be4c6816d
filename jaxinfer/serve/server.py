"""A process that serves: its socket, its signals and its end."""

import asyncio
import socket
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from jaxinfer.serve.context import Context

HEADER_BYTES = 16 * 1024
"""Of a request's line and headers, at most."""

LEAVE_S = 5
"""Seconds that connections have to close, once their answers are whole or given up."""


def bound(host: str, port: int) -> socket.socket:
    """A socket at an address, which does not listen yet: clients are refused until it does.

    Raises:
      ValueError: the address is in use, or not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        raise ValueError(
            f"cannot serve at {host}:{port}: {error.strerror}; choose another host or port"
        ) from error
    return found


class Server(uvicorn.Server):
    """A uvicorn server that drains: a first signal refuses new requests and lets those that run
    go on for `ServeConfig.drain_s`, a second one ends at once.

    `aborted` is the number of the second signal, None without one. Then, or if the server ended
    before all was compiled, other threads are in the middle of something (`busy`).
    """

    def __init__(self, app: Starlette):
        self._context: Context = app.state.context
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self.aborted: int | None = None
        super().__init__(
            uvicorn.Config(
                app, loop="asyncio", http="h11", ws="none", log_config=None, access_log=False,
                server_header=False, h11_max_incomplete_event_size=HEADER_BYTES,
                timeout_graceful_shutdown=LEAVE_S,
            )
        )  # fmt: skip

    @property
    def busy(self) -> bool:
        """Whether the process should end without waiting for its threads."""
        return self.aborted is not None or not self._context.warm

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Answers a signal; uvicorn's own way would close the socket before it drains."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._end, sig)

    def _end(self, number: int) -> None:
        if self._draining is None:
            self._draining = asyncio.ensure_future(self._drain())
        elif self.aborted is None:
            self.aborted = int(number)
            self._context.log.event("ended by a second signal; what runs is given up")
            self.should_exit = self.force_exit = True

    async def _drain(self) -> None:
        context = self._context
        running, seconds = context.drain.running, context.config.drain_s
        context.log.event(f"draining: {running} requests run, for {seconds:g} seconds at most")
        if not await context.drain.wait():
            context.log.event("drained too slowly; what still runs is given up")
            await asyncio.to_thread(context.batcher.close, cancel=True)
        self.should_exit, self.force_exit = True, not context.warm
