"""Things that are found by name: the library's own, those registered, and those of other packages.

Another package offers one as an entry point; it is imported when its name is first asked for.
"""

import difflib
from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from jaxinfer.files import quoted

T = TypeVar("T")


def meant(name: object, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` where a known name is close to `name`, else nothing; for messages."""
    text = name[:100].lower() if isinstance(name, str) else ""
    close = difflib.get_close_matches(text, list(known), 1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ";"


class Registry(Generic[T]):
    """Values by name.

    Args:
        kind: what they are, for messages: "cache policy".
        group: the entry-point group in which other packages offer them.
        own: the library's.
    """

    def __init__(self, kind: str, group: str, own: Mapping[str, T]):
        self.kind, self.group, self._known = kind, group, dict(own)

    def register(self, name: str, value: T) -> None:
        """Makes `value` known as `name`; a name is taken once.

        Raises:
            ValueError: for a name that stands for another value already.
        """
        if not isinstance(name, str) or not name or not name.isprintable() or len(name) > 100:
            raise ValueError(
                f"the name of a {self.kind} must be a short text that can be printed, got "
                f"{quoted(name)}"
            )
        if self._known.setdefault(name, value) is not value:
            raise ValueError(f"there is a {self.kind} {name!r} already; choose another name")

    def find(self, name: str) -> T | None:
        """The value of that name, None if nobody has one.

        Raises:
            ValueError: if the package that offers it cannot be imported.
        """
        if name not in self._known:
            for entry in self._offered():
                if entry.name == name:
                    self._known[name] = self._loaded(entry)
                    break
        return self._known.get(name)

    def names(self) -> list[str]:
        """All names, in alphabetical order behind the library's own; nothing is imported."""
        offered = sorted({entry.name for entry in self._offered()} - set(self._known))
        return [*self._known, *offered]

    def _offered(self) -> list[EntryPoint]:
        return list(entry_points(group=self.group))

    def _loaded(self, entry: EntryPoint) -> T:
        try:
            return entry.load()
        except Exception as error:  # whatever another package does when it is imported
            package = entry.dist.name if entry.dist is not None else "a package"
            raise ValueError(
                f"{self.kind} {entry.name!r} of {package} cannot be loaded from {entry.value!r}: "
                f"{type(error).__name__}: {error}"
            ) from error
