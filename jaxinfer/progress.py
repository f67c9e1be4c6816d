"""Progress bars on a terminal's standard error; where there is no terminal, nothing."""

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

DELAY = 1.0  # seconds without a bar: work that is soon done flashes none

_shown: "Progress | None" = None  # what is open; a terminal has room for one


@runtime_checkable
class Report(Protocol):
    """Tells how far some work is; work that draws nothing takes `silent`."""

    def __call__(self, what: str, done: int, total: int, note: str = "") -> None: ...


def silent(what: str, done: int, total: int, note: str = "") -> None:
    """A `Report` that draws nothing."""


@contextlib.contextmanager
def bars(*, transient: bool = True) -> Iterator[Report]:
    """A report that draws one bar for each `what`, with a short note behind its name.

    Inside another such block its bars stand below the outer ones, until they are done with.

    Args:
      transient: whether the bars vanish when the block ends.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        yield silent
        return
    with _display(transient) as display:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int, note: str = "") -> None:
            if what not in tasks:
                tasks[what] = display.add_task(what)
            name = f"{what} {note}".strip()
            # of an unknown total the bar shows only that something happens
            display.update(tasks[what], completed=done, total=total or None, description=name)

        try:
            yield report
        finally:
            if transient:
                for task in tasks.values():
                    display.remove_task(task)


@contextlib.contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A `report(done, total)` of one piece of work, whose bar vanishes at its end."""
    with bars() as report:
        report(label, 0, 0)
        yield functools.partial(report, label)


@contextlib.contextmanager
def _display(transient: bool) -> "Iterator[Progress]":
    """The display that is open, or a new one that shows after a moment and closes at the end."""
    global _shown
    if _shown is not None:
        yield _shown
        return
    from rich.console import Console
    from rich.progress import Progress

    # Results that are printed meanwhile go where they belong.
    display = Progress(console=Console(stderr=True), transient=transient, redirect_stdout=False)
    starter = threading.Timer(DELAY, display.start)
    starter.daemon = True
    starter.start()
    _shown = display
    try:
        yield display
    finally:
        _shown = None
        starter.cancel()
        starter.join()
        display.stop()
