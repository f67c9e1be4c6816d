"""What a run says beside its results: notes, warnings and errors, each one line on standard error.

Warnings of the checks are held until the work begins or is done, so that a run which is refused
prints its error only; those that come later are printed when they occur, each text once.
"""

import contextlib
import sys
import warnings
from collections.abc import Iterator

from jaxinfer.files import one_line

LONGEST_LINE = 1000
OURS = "jaxinfer"  # the modules whose warnings are for users

_said: set[str] = set()
_held: list[str] | None = None  # None: warnings are printed as they come


def note(message: str) -> None:
    """Prints one line."""
    print(one_line(message, LONGEST_LINE), file=sys.stderr, flush=True)


def error_text(error: Exception) -> str:
    """What an error says; one of the file system names its file."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error)


def work_begins() -> None:
    """Prints the warnings that were held; from here on each is printed when it occurs."""
    global _held
    held, _held = _held or [], None
    for text in held:
        _warn(text)


@contextlib.contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Warnings of the library become lines, those of other packages only with `python -W`."""
    global _held
    _said.clear()
    _held = []
    with warnings.catch_warnings():
        warnings.simplefilter("default" if sys.warnoptions else "ignore")
        warnings.filterwarnings("always", category=UserWarning, module=OURS)
        warnings.showwarning = _show
        try:
            yield
        finally:
            _held = None


def _show(message: Warning | str, *_: object, **__: object) -> None:
    if _held is None:
        _warn(str(message))
    else:
        _held.append(str(message))


def _warn(text: str) -> None:
    if text not in _said:
        _said.add(text)
        note(f"warning: {text}")
