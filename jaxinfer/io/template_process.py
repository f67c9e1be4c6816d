"""Templates rendered in a process of their own, which is kept from one rendering to the next.

The process limits itself (`template_worker`); here is who starts it, waits for it, and gives it up
when it does not answer. It is a fresh interpreter and no fork, since this process has the threads
of JAX. It is in a process group of its own, so Ctrl-C at a terminal reaches only us.
"""

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Mapping
from typing import Any

from jaxinfer.io import template_worker as worker

WALL_SECONDS = 3.5
"""A rendering that waits for nothing ends by its processor time; this is for a busy machine."""

START_SECONDS = 60.0
"""Imports from a slow disk may take this long."""

MAX_REQUEST = 16 * 2**20
"""Bytes of a template and what it is rendered with."""

MAX_REPLY = 6 * worker.MAX_OUTPUT + 2**16
"""Bytes of the longest reply: JSON writes a character in at most six."""


class Failure(Exception):
    """Why there is no text; `kind` is the class of a template's own error."""

    def __init__(self, reason: str, kind: str = ""):
        super().__init__(reason)
        self.kind = kind


class Process:
    """One running `template_worker`."""

    def __init__(self):
        if not sys.executable:
            raise Failure("it needs a Python interpreter to run in, and sys.executable is empty")
        command = [sys.executable, "-I", "-S", worker.__file__, *_import_path()]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                process_group=0,
                cwd="/",
            )
        except OSError as error:
            raise Failure(f"{sys.executable} does not start: {error.strerror}") from None
        try:
            reply = self._ask(None, START_SECONDS)
        except BaseException:
            self.end()
            raise
        if "error" in reply:
            self.end()
            raise Failure(f"{sys.executable} cannot render it: {reply['error']}")

    def answer(self, request: bytes) -> dict[str, Any]:
        """The reply to a request; `Failure` when there is none, and the process is then gone."""
        return self._ask(request, WALL_SECONDS)

    def lives(self) -> bool:
        return self._process.poll() is None

    def end(self) -> int:
        """Ends and reaps it; the exit code that it had, or the signal as a negative number."""
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # what was not written is of no interest
                stream.close()  # type: ignore[union-attr]
        return self._process.wait()

    def _ask(self, request: bytes | None, seconds: float) -> dict[str, Any]:
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self._process.kill()

        clock = threading.Timer(seconds, give_up)
        clock.daemon = True
        clock.start()
        try:
            if request is not None:
                worker.send(self._process.stdin, request)  # type: ignore[arg-type]
            reply = worker.receive(self._process.stdout, MAX_REPLY)  # type: ignore[arg-type]
        except OSError:  # it ended while it was written to
            reply = None
        finally:
            clock.cancel()
            clock.join()
        if reply is None or late.is_set():
            raise Failure(_reason(self._code(), late.is_set(), seconds))
        return worker.unpacked(reply)

    def _code(self) -> int:
        try:
            return self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return self.end()


def _reason(code: int, late: bool, seconds: float) -> str:
    if late:
        return f"it takes more than {seconds:g} s"
    if -code in (signal.SIGPROF, signal.SIGXCPU):
        return f"it takes more than {worker.CPU_SECONDS:g} s of processor time"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"exit code {code}"
    return f"it ended the process that rendered it ({name})"


def _import_path() -> list[str]:
    """Where packages are, without the current folder: what lies there is not ours to run."""
    try:
        here = os.path.realpath(os.getcwd())
    except OSError:
        here = ""
    paths = sysconfig.get_paths()
    others = [p for p in sys.path if os.path.isabs(p) and os.path.realpath(p) != here]
    return list(dict.fromkeys([paths["purelib"], paths["platlib"], *others]))


class Renderer:
    """Renders one template at a time, whichever thread asks."""

    def __init__(self):
        self._lock = threading.Lock()
        self._process: Process | None = None

    def answer(self, request: bytes) -> dict[str, Any]:
        with self._lock:
            process, self._process = self._process, None
            if process is not None and not process.lives():
                process.end()
                process = None
            process = process or Process()
            try:
                reply = process.answer(request)
            except BaseException:  # Ctrl-C too: an answer that nobody reads would be the next one's
                process.end()
                raise
            if reply["last"]:
                process.end()
            else:
                self._process = process
        return reply

    def end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.end()


_renderer = Renderer()
_of_the_parent: list[Renderer] = []


def render(template: str, values: Mapping[str, object]) -> str:
    """The text of a jinja2 template with these variables, all of them JSON values.

    Raises:
      Failure: the template failed, or took more than it may have.
    """
    request = worker.packed({"template": template, "values": values})
    if len(request) > MAX_REQUEST:
        raise Failure(f"template and messages have {len(request)} bytes; at most {MAX_REQUEST} go")
    reply = _renderer.answer(request)
    if "error" in reply:
        raise Failure(reply["error"], reply.get("kind", ""))
    return reply["text"]


def _forked() -> None:
    """A forked process starts a worker of its own; the parent's is left alone."""
    global _renderer
    _of_the_parent.append(_renderer)
    _renderer = Renderer()


os.register_at_fork(after_in_child=_forked)
atexit.register(lambda: _renderer.end())
