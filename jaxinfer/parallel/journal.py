"""`Journal`: what a controller needs of each request to make its row again after a loss.

The prompt, and the tokens that were drawn since. The row's random key and all that it asked for are
in the controller's own state, which no loss touches, so that a row which was made again goes on
with the tokens that it would have drawn.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field


@dataclass
class Entry:
    """One request."""

    number: int  # by which the stages know it
    prompt: list[int]
    emitted: list[int] = field(default_factory=list)
    made_in: int = -1  # the incarnation in whose caches its prompt was read

    @property
    def cached(self) -> int:
        """Tokens that its row holds: all but the last one, which is to be read next."""
        return len(self.prompt) + max(len(self.emitted) - 1, 0)


class Journal:
    """The entries of all requests that are read or run."""

    def __init__(self):
        self._entries: dict[Hashable, Entry] = {}
        self._numbers = 0

    def __len__(self) -> int:
        return len(self._entries)

    def open(self, owner: Hashable, prompt: Sequence[int]) -> Entry:
        """A new entry."""
        self._numbers += 1
        entry = self._entries[owner] = Entry(self._numbers, list(prompt))
        return entry

    def of(self, owner: Hashable) -> Entry:
        """The entry of a request that has one."""
        return self._entries[owner]

    def close(self, owner: Hashable) -> None:
        """Forgets a request that has ended."""
        self._entries.pop(owner, None)
