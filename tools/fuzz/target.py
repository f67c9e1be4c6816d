"""`Target`: one parser with good examples of what it reads, and what may come of a damaged one."""

import random
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tools.fuzz.mutations import damaged

LONGEST = 1000
"""Characters of a message."""

Files = dict[str, bytes]
"""Contents by path inside a folder."""


@dataclass(frozen=True)
class Target:
    """A parser.

    name: what `--parser` takes.
    make: writes a good example into an empty folder.
    parse: reads such a folder; what must hold of what was read it asserts.
    files: which files of the example are damaged, as patterns; more weight to those named often.
    share: how many inputs it gets, beside the other targets.
    mutate: makes a damaged file of a good one; None goes by the ending.
    names_file: whether every refusal must name the folder of what is wrong.
    """

    name: str
    make: Callable[[Path], object]
    parse: Callable[[Path], object]
    files: tuple[str, ...] = ("*",)
    share: int = 10
    mutate: Callable[[random.Random, str, bytes], bytes] | None = None
    names_file: bool = False

    def draw(self, rng: random.Random, good: Files) -> tuple[str, bytes]:
        """A file of the example with its damaged content."""
        pattern = rng.choice(self.files)
        names = sorted(name for name in good if Path(name).match(pattern))
        name = rng.choice(names)
        return name, (self.mutate or damaged)(rng, name, good[name])


def read_files(folder: Path) -> Files:
    """The contents of all files of a folder."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def outcome(target: Target, folder: Path) -> str | None:
    """What is wrong with how the folder is read or refused; None if nothing is."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            target.parse(folder)
        except (ValueError, OSError) as error:
            wrong = _wrong_with(error)
            if wrong is None and target.names_file and str(folder) not in str(error):
                wrong = f"a refusal that does not name the file: {str(error)!r:.300}"
            if wrong is not None:
                return wrong
        except BaseException as error:  # Rust's panics are no Exceptions
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            return _described(error)
    for warning in caught:
        if issubclass(warning.category, UserWarning) and not _is_line(str(warning.message)):
            return f"a warning that is no line: {str(warning.message)!r:.300}"
    return None


def _described(error: BaseException) -> str:
    """Its kind, where it came from, and what it says."""
    frames = traceback.extract_tb(error.__traceback__)
    where = next((f for f in reversed(frames) if "site-packages" not in f.filename), frames[-1])
    place = f"{Path(where.filename).name}:{where.lineno}"
    return f"{type(error).__name__} at {place}: {str(error)!r:.300}"


def _wrong_with(error: ValueError | OSError) -> str | None:
    kind = type(error)
    own = kind is ValueError or kind.__module__.startswith("jaxinfer")
    if not own and not isinstance(error, OSError):
        return f"a foreign {kind.__name__}: {str(error)!r:.300}"
    return None if _is_line(str(error)) else f"a message that is no line: {str(error)!r:.300}"


def _is_line(text: str) -> bool:
    return bool(text) and len(text) <= LONGEST and text.isprintable()
