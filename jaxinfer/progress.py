"""Progress bars on a terminal's standard error; where there is no terminal, nothing."""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable


@runtime_checkable
class Report(Protocol):
    """Tells how far some work is; work that draws nothing takes `silent`."""

    def __call__(self, what: str, done: int, total: int, note: str = "") -> None: ...


def silent(what: str, done: int, total: int, note: str = "") -> None:
    """A `Report` that draws nothing."""


@contextlib.contextmanager
def bars(*, transient: bool = True) -> Iterator[Report]:
    """A report that draws one bar for each `what`, with a short note behind its name.

    Args:
      transient: whether the bars vanish when the block ends.
    """
    if not sys.stderr.isatty():
        yield silent
        return
    from rich.console import Console
    from rich.progress import Progress

    display, tasks = Progress(console=Console(stderr=True), transient=transient), {}

    def report(what: str, done: int, total: int, note: str = "") -> None:
        if what not in tasks:
            tasks[what] = display.add_task(what)
        display.start()  # with the first report: work that is soon done flashes no bar
        name = f"{what} {note}".strip()
        display.update(tasks[what], completed=done, total=total, description=name)

    try:
        yield report
    finally:
        display.stop()


@contextlib.contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A `report(done, total)` of one piece of work, whose bar vanishes at its end."""
    with bars() as report:
        yield functools.partial(report, label)
