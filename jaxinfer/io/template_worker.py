"""The process that renders chat templates: a script that `template_process` starts and talks to.

A template is somebody else's program. jinja2's sandbox keeps it away from Python's internals, and
the kernel keeps it away from everything else: processor time, memory, files and processes are
limited before the first template is read, so no expression has to be known as dangerous.

The script imports nothing of jaxinfer and is run as `python -I -S`, which starts in a tenth of a
second. A message, in either direction, is 8 bytes of length and that much JSON.
"""

import contextlib
import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, BinaryIO

CPU_SECONDS = 2.0
"""Processor time of one rendering, compilation included."""

MEMORY = 224 * 2**20
"""Bytes that a rendering may map; the interpreter itself takes 20 MB more."""

MAX_OUTPUT = 4 * 2**20
"""Characters that a template may write."""

GROWN = 64 * 2**20
"""A process that keeps this many bytes more than at its start is not used again: a later template
would miss them."""


def send(stream: BinaryIO, data: bytes) -> None:
    """Writes one message."""
    stream.write(len(data).to_bytes(8, "little") + data)
    stream.flush()


def receive(stream: BinaryIO, most: int = 2**62) -> bytes | None:
    """Reads one message of at most `most` bytes; None when the other side is gone."""
    size = int.from_bytes(stream.read(8), "little")
    data = stream.read(size) if size <= most else b""
    return data if data and len(data) == size else None


def packed(value: object) -> bytes:
    """JSON; lone surrogates, which a text can hold too, pass."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def unpacked(data: bytes) -> Any:
    return json.loads(data.decode("utf-8", "surrogatepass"))


def main(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answers until nobody asks any more."""
    try:
        environment()
    except ImportError as error:
        return send(replies, packed({"error": str(error)}))
    mapped = address_space()
    start = mapped()
    limit_process(start + MEMORY)
    send(replies, packed({}))
    while (request := receive(requests)) is not None:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # its signal ends the process
        reply = answer(request, lambda: mapped() - start > GROWN)
        signal.setitimer(signal.ITIMER_PROF, 0)
        send(replies, reply)
        del request, reply


def address_space() -> Callable[[], int]:
    """What returns the bytes of memory that are mapped. (The peak is of no use: a process inherits
    that of its parent.)"""
    try:
        file = open("/proc/self/statm", "rb", buffering=0)  # noqa: SIM115 (read as long as we run)
    except OSError:  # another system
        return lambda: 0
    page = os.sysconf("SC_PAGE_SIZE")
    return lambda: int(os.pread(file.fileno(), 64, 0).split()[0]) * page


def limit_process(memory: int) -> None:
    """No more memory than this, and neither files nor processes."""
    import resource

    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    limits = {"AS": memory, "CORE": 0, "FSIZE": 0, "NOFILE": 0, "NPROC": 0}
    for name, value in limits.items():
        # a system that lacks one of them still has the clock of the process that waits
        with contextlib.suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def answer(request: bytes, has_grown: Callable[[], bool]) -> bytes:
    """The text, or what a template failed with: it can raise whatever its expressions raise."""
    try:
        return packed({"text": render(**unpacked(request)), "last": has_grown()})
    except MemoryError:
        return packed({"error": f"it needs more than {MEMORY // 2**20} MB of memory", "last": True})
    except OSError:  # a codec of its own, for example, lies in a file
        return packed({"error": "it needs a file, and a template may read none", "last": True})
    except Exception as error:
        kind = type(error).__name__[:80]
        return packed({"error": _message(error), "kind": kind, "last": has_grown()})


def _message(error: Exception) -> str:
    try:
        return str(error)[:2000]
    except Exception:  # a template can make an error of things that cannot be printed
        return "its message cannot be printed"


def render(template: str, values: dict[str, Any]) -> str:
    pieces, total = [], 0
    for piece in compiled(template).generate(**values):
        pieces.append(piece)
        total += len(piece)
        if total > MAX_OUTPUT:
            raise ValueError(f"it writes a text of more than {MAX_OUTPUT} characters")
    return "".join(pieces)


@functools.lru_cache(maxsize=8)
def compiled(template: str) -> Any:
    return environment().from_string(template)


@functools.cache
def environment() -> Any:
    """What Hugging Face gives a template."""
    import datetime

    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks assistant text for training; its body is rendered as is."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            # a call block, so that what is set inside stays inside
            return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

        def _body(self, caller: Any) -> Any:
            return caller()

    class Namespace(jinja2.utils.Namespace):
        """jinja2's, which would also keep names that Python gives a meaning."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            self, *rest = args
            jinja2.utils.Namespace.__init__(self)
            for name, value in dict(*rest, **kwargs).items():
                self[name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace cannot keep {name!r}")
            jinja2.utils.Namespace.__setitem__(self, name, value)

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    env.filters["tojson"] = to_json
    env.globals["namespace"] = Namespace
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    _read_what_is_read_late()
    return env


def _read_what_is_read_late() -> None:
    """The files that jinja2 and Python open at first use, while files may be opened."""
    import codecs
    import html  # noqa: F401
    import pprint  # noqa: F401
    import textwrap  # noqa: F401

    import jinja2.constants
    import jinja2.debug  # noqa: F401

    codecs.lookup("unicode_escape")
    time.localtime()


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own escapes HTML, which a prompt is not."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


if __name__ == "__main__":
    sys.path += sys.argv[1:]
    with contextlib.suppress(BrokenPipeError):
        main(sys.stdin.buffer, sys.stdout.buffer)
