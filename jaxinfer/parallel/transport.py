"""How messages go from process to process: pushed over TCP, or handed over within a process.

A connection begins with a secret that only the processes of one pipeline know. Whoever sends
anything else, or a message that is damaged or too large, loses that connection and nothing more
happens. A `Delay` makes a connection as slow as another link: what arrives is held back.
"""

import contextlib
import hmac
import queue
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxinfer.arguments import real
from jaxinfer.parallel.message import (
    HEAD,
    PAYLOAD_BYTES,
    BadMessage,
    Head,
    Message,
    decoded,
    encoded,
)

HELLO_S = 5.0  # in which a new connection must have said who it is
HELLO_BYTES = 2**12


class Closed(ConnectionError):
    """The other end is gone, or sent what is no message."""


@dataclass(frozen=True)
class Delay:
    """A link that takes `latency_s` for each message, and one second for `bytes_per_s`."""

    latency_s: float = 0.0
    bytes_per_s: float = float("inf")

    def __post_init__(self):
        real("latency_s", self.latency_s, 0.0, 60.0)
        real("bytes_per_s", self.bytes_per_s, 1.0)


@runtime_checkable
class Connection(Protocol):
    """One end of a connection; one thread sends and one receives."""

    def send(self, message: Message) -> None:
        """Hands a message over; `Closed` if nobody can get it."""
        ...

    def receive(self, timeout: float | None = None) -> Message:
        """The next message; `TimeoutError` if none comes in time, `Closed` if none will."""
        ...

    def close(self) -> None:
        """Ends it; the other end sees `Closed`."""
        ...


class TcpConnection:
    """A connection over a socket.

    Args:
      sock: connected.
      limit: bytes of a message's arrays, at most.
      delay: as which slower link it should behave, on receipt.
    """

    def __init__(self, sock: socket.socket, limit: int = PAYLOAD_BYTES, delay: Delay | None = None):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(None)
        self._socket, self.limit, self._delay = sock, limit, delay or Delay()
        self._sending = threading.Lock()
        self._free_at = 0.0  # when the link has passed on all that came so far

    def send(self, message: Message) -> None:
        fields = message.fields
        if self._delay != Delay():
            fields = fields | {"sent": time.monotonic()}  # one clock for all of a machine
        try:
            with self._sending:
                for part in encoded(message._replace(fields=fields), self.limit):
                    self._socket.sendall(part)
        except OSError as error:
            self.close()
            raise Closed(f"the connection is lost: {error.strerror or error}") from error

    def receive(self, timeout: float | None = None) -> Message:
        head = self._exactly(HEAD.size, timeout)  # only its first byte may take as long as it wants
        try:
            sizes = Head.of(bytes(head), self.limit)
            header = bytes(self._exactly(sizes.header, None))
            message = decoded(sizes, header, self._exactly(sizes.payload, None))
        except BadMessage as error:
            self.close()
            raise Closed(str(error)) from error
        self._hold_back(message, sizes)
        return message

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the other end is gone already
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _exactly(self, size: int, timeout: float | None) -> bytearray:
        data = bytearray(size)
        view, had = memoryview(data), 0
        try:
            self._socket.settimeout(timeout)
            while had < size:
                count = self._socket.recv_into(view[had:])
                if not count:
                    raise Closed("the connection is closed")
                had += count
                self._socket.settimeout(None)
        except TimeoutError:
            raise
        except Closed:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise Closed(f"the connection is lost: {error.strerror or error}") from error
        return data

    def _hold_back(self, message: Message, sizes: Head) -> None:
        sent = message.fields.pop("sent", None)
        if not isinstance(sent, float):
            return
        now, most = time.monotonic(), 60.0
        seconds = (HEAD.size + sizes.header + sizes.payload) / self._delay.bytes_per_s
        self._free_at = max(self._free_at, min(sent, now)) + min(seconds, most)
        time.sleep(max(0.0, min(self._free_at + self._delay.latency_s - now, most)))


class LocalConnection:
    """A connection within a process: arrays are handed over as they are, also those of a device."""

    def __init__(self, inbox: "queue.SimpleQueue[Message | None]", outbox: "queue.SimpleQueue"):
        self._inbox, self._outbox, self._closed = inbox, outbox, False

    @classmethod
    def pair(cls) -> "tuple[LocalConnection, LocalConnection]":
        """Both ends."""
        there, back = queue.SimpleQueue(), queue.SimpleQueue()
        return cls(there, back), cls(back, there)

    def send(self, message: Message) -> None:
        if self._closed:
            raise Closed("the connection is closed")
        self._outbox.put(message)

    def receive(self, timeout: float | None = None) -> Message:
        if self._closed:
            raise Closed("the connection is closed")
        try:
            message = self._inbox.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError("no message came in time") from None
        if message is None:
            self._closed = True
            raise Closed("the connection is closed")
        return message

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._outbox.put(None)
            self._inbox.put(None)


class Listener:
    """Takes connections at a free port; those that know the secret are given to `taken`, with the
    fields of their first message.

    Args:
      secret: what the first message must hold.
      taken: called in a thread of the connection's own.
      host: the address.
      delay: of the connections that are taken.
    """

    def __init__(
        self,
        secret: str,
        taken: Callable[[TcpConnection, dict[str, object]], None],
        host: str = "127.0.0.1",
        delay: Delay | None = None,
    ):
        self._secret, self._taken, self._delay = secret, taken, delay
        self._socket = socket.create_server((host, 0), backlog=64)
        self.address: tuple[str, int] = self._socket.getsockname()[:2]
        threading.Thread(target=self._accept, name="jaxinfer-listener", daemon=True).start()

    def close(self) -> None:
        """Takes no more."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._greet, args=(sock,), daemon=True).start()

    def _greet(self, sock: socket.socket) -> None:
        connection = TcpConnection(sock, HELLO_BYTES, self._delay)
        timer = threading.Timer(HELLO_S, connection.close)  # of the whole hello, however it drips
        timer.start()
        try:
            hello = connection.receive(HELLO_S)
        except (Closed, TimeoutError):
            connection.close()
            return
        finally:
            timer.cancel()
        given = hello.fields.pop("secret", None)
        fits = isinstance(given, str) and hmac.compare_digest(given.encode(), self._secret.encode())
        if hello.what != "hello" or not fits:
            connection.close()
            return
        connection.limit = PAYLOAD_BYTES
        self._taken(connection, hello.fields)


def connect(
    address: tuple[str, int],
    secret: str,
    *,
    delay: Delay | None = None,
    timeout: float = HELLO_S,
    **who: object,
) -> TcpConnection:
    """A connection to a `Listener`.

    Raises:
      Closed: nobody listens there.
    """
    try:
        sock = socket.create_connection(address, timeout=timeout)
    except OSError as error:
        raise Closed(f"nobody listens at {address[0]}:{address[1]}: {error}") from error
    connection = TcpConnection(sock, delay=delay)
    connection.send(Message("hello", who | {"secret": secret}))
    return connection
