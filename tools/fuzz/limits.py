"""What one input may take, and how a process is held to it."""

import contextlib
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

SECONDS = 5.0
"""Of processor time: a machine that is busy with other work makes nothing a finding."""

SILENCE = 60.0
"""Of real time, after which a process is ended that waits, or hangs where Python cannot stop it."""

MOST_BYTES = 2 * 2**30


class Hang(BaseException):
    """Raised where an input is being read when its time is up."""


def limit_memory() -> None:
    """Lets this process take `MOST_BYTES` beyond the addresses that it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MOST_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))


def peak_bytes() -> int:
    """The most memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def limited_time() -> Iterator[None]:
    """Raises `Hang` inside the block after `SECONDS` of processor time."""

    def stop(*_: object) -> None:
        raise Hang(f"no answer after {SECONDS} s of processor time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
