"""Ctrl-C of the command: heard where it does no harm, and at once where nothing can be lost.

Python raises `KeyboardInterrupt` at whatever line the main thread has reached. Inside jax that may
be a callback of its compiler, which takes the process down, or of the garbage collector, which
drops the exception and goes on. Here it is raised only where no such library is on the stack; until
then a timer asks again.

While a compilation or a compiled program runs, no line of Python is reached at all. A thread that
reads Python's wake-up pipe knows of the press nevertheless. When nothing came of it for a moment,
the thread ends the process; inside `finishing`, where something would be lost, it says that the
command goes on to the next safe point, and leaves the rest to a second press.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130
MOMENT = 0.3  # seconds that a press may go unanswered
AGAIN = 0.02  # seconds between two looks for a safe place
LIBRARIES = {"jax", "jaxlib", "orbax", "tensorstore", "asyncio", "importlib"}
SHOW_CURSOR = "\x1b[?25h"  # a progress bar hides it
RAISED = 0  # in the pipe, beside the numbers of signals: what was pressed has been answered

_losses = 0  # blocks of `finishing` that are open


@contextlib.contextmanager
def finishing() -> Iterator[None]:
    """While this is open, a first Ctrl-C waits for a safe point, as something would be lost."""
    global _losses
    _losses += 1
    try:
        yield
    finally:
        _losses -= 1


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Ctrl-C as above, for the rest of a process that is one command.

    Behind the block it ends the process: nothing else is left to do. A process that ignores
    Ctrl-C, as one that a shell put into the background does, goes on ignoring it.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    presses = _Presses(writer)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGALRM, presses.look)
    signal.signal(signal.SIGINT, presses.press)
    sys.unraisablehook = presses.dropped
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(INTERRUPTED))
        signal.setitimer(signal.ITIMER_REAL, 0)


@contextlib.contextmanager
def answered_elsewhere() -> Iterator[None]:
    """While this is open, what runs inside answers signals by handlers of its own."""
    pipe = signal.set_wakeup_fd(-1)
    try:
        yield
    finally:
        signal.set_wakeup_fd(pipe, warn_on_full_buffer=False)


class _Presses:
    """The main thread's side: what Python calls when a signal came."""

    def __init__(self, pipe: int):
        self._pipe, self._pending, self._hook = pipe, False, sys.unraisablehook

    def press(self, number: int, frame: FrameType | None) -> None:
        self._pending = True
        self.look(number, frame)

    def look(self, number: int, frame: FrameType | None) -> None:
        """Raises if there is something to raise and nobody whom it would hurt."""
        if not self._pending:
            return
        if _inside_library(frame):
            signal.setitimer(signal.ITIMER_REAL, AGAIN)
            return
        self._pending = False
        self._tell(RAISED)
        raise KeyboardInterrupt

    def dropped(self, what: "sys.UnraisableHookArgs") -> None:
        """What nobody could catch, as in a finalizer: the press still counts."""
        if what.exc_type is not KeyboardInterrupt:
            return self._hook(what)
        self._pending = True
        self._tell(signal.SIGINT)
        signal.setitimer(signal.ITIMER_REAL, AGAIN)

    def _tell(self, byte: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._pipe, bytes([byte]))


def _inside_library(frame: FrameType | None) -> bool:
    while frame is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] in LIBRARIES:
            return True
        frame = frame.f_back
    return False


def _watch(pipe: int) -> None:
    """The thread: ends the process, or tells why it does not end yet."""
    presses, told, deadline = 0, False, 0.0
    while True:
        waits = max(deadline - time.monotonic(), 0) if presses and not told else None
        if select.select([pipe], [], [], waits)[0]:
            for byte in os.read(pipe, 4096):
                if byte == RAISED:
                    presses, told = 0, False
                elif byte == signal.SIGINT:
                    deadline = deadline if presses else time.monotonic() + MOMENT
                    presses += 1
        if not presses or time.monotonic() < deadline:
            continue
        if presses > 1 or not _losses:
            leave(INTERRUPTED)
        if not told:
            told = True
            _say("interrupted; this step is finished first, Ctrl-C again to quit now")


def _say(message: str) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(message, file=sys.stderr, flush=True)


def leave(code: int) -> NoReturn:
    """Ends the process at once, whatever its threads do."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if sys.stderr.isatty():
            sys.stderr.write(SHOW_CURSOR)
        sys.stdout.flush()
    os._exit(code)
