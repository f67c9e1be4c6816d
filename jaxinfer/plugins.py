"""Things that are found by name: the library's own, those registered, and those of other packages.

Another package offers one as an entry point; it is imported when its name is first asked for.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from jaxinfer.arguments import shown
from jaxinfer.files import one_line, quoted

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


class Factories(Registry[Callable[..., T]]):
    """Functions that make what users choose by name, with arguments.

    Args:
        kind: what they make, for messages: "cache policy"; its last word alone names one.
        plural: several of these: "policies".
        group: the entry-point group in which other packages offer them.
        makes: the class of what they make.
        own: the library's.
    """

    def __init__(
        self,
        kind: str,
        plural: str,
        group: str,
        makes: type[T],
        own: Mapping[str, Callable[..., T]],
    ):
        super().__init__(kind, group, own)
        self.plural, self.makes, self.short = plural, makes, kind.split()[-1]

    def __contains__(self, name: str) -> bool:
        return name in self.names()

    def register(self, name: str, value: Callable[..., T]) -> None:
        """Makes the factory `value` known as `name`; a name is taken once.

        Raises:
            ValueError: for a name that stands for another factory already, or what is none.
        """
        if not callable(value):
            kind = self.makes.__name__
            raise ValueError(
                f"factory must be a function that returns a {kind}, got {shown(value)}"
            )
        super().register(name, value)

    def make(self, given: str | Mapping[str, object]) -> T:
        """What a name means, or a mapping with "name" and arguments.

        Raises:
            ValueError: the name is unknown, or its factory does not take these arguments.
        """
        arguments = {"name": given} if isinstance(given, str) else dict(given)
        name = arguments.pop("name", None)
        factory = self.find(name) if isinstance(name, str) else None
        if factory is None:
            known = self.names()
            raise ValueError(
                f"unknown {self.kind} {shown(name)}{meant(name, known)} known {self.plural}: "
                f"{', '.join(known)}"
            )
        self._check_arguments(name, factory, arguments)
        try:
            made = factory(**arguments)
        except (TypeError, RecursionError) as error:
            raise ValueError(
                f"{self.short} {name!r} does not take these arguments: {one_line(error, 160)}"
            ) from error
        if not isinstance(made, self.makes):
            raise ValueError(
                f"the factory of {self.short} {name!r} made no {self.makes.__name__}, but "
                f"{shown(made)}"
            )
        return made

    def _check_arguments(
        self, name: object, factory: Callable[..., T], arguments: Mapping[str, object]
    ) -> None:
        """Refuses arguments that the factory has not, and names those that it has."""
        parameters = inspect.signature(factory).parameters.values()
        if any(one.kind is one.VAR_KEYWORD for one in parameters):
            return
        known = [one.name for one in parameters]
        for argument in arguments:
            if argument not in known:
                takes = f"it takes {', '.join(known)}" if known else "it takes none"
                raise ValueError(
                    f"{self.short} {name!r} does not take the argument {shown(argument)}"
                    f"{meant(argument, known)} {takes}"
                )
