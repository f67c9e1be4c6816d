"""Tokens to text while they arrive: whole UTF-8 characters only, stop strings across token
borders."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable


@runtime_checkable
class Decoder(Protocol):
    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str: ...


class TextStream:
    """Turns one row's tokens into text pieces.

    A piece never ends inside a character, nor inside what may become a stop string. `stopped` is
    set when a stop string appeared; the text ends before it.
    """

    def __init__(self, tokenizer: Decoder, stop: Sequence[str] = ()):
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(s for s in stop if s)
        self._ids: list[int] = []
        self._start = 0  # ids before this are final; decoding a short tail keeps this linear
        self._settled = ""  # text of ids[:start]
        self._sent = 0

    def push(self, ids: Sequence[int], last: bool = False) -> str:
        """The text that `ids` completed; with `last` also what was held back."""
        if self.stopped:
            return ""
        self._ids.extend(ids)
        tail = self._tokenizer.decode(self._ids[self._start :])
        whole = last or not tail.endswith("\ufffd")
        text = self._settled + (tail if whole else tail.rstrip("\ufffd"))
        found = [at for at in (text.find(s) for s in self._stop) if at >= 0]
        if found:
            self.stopped, safe = True, min(found)
            text = text[:safe]
        else:
            safe = len(text) if last else len(text) - _held_back(text, self._stop)
        self.text = text
        piece = text[self._sent : safe]
        self._sent = max(self._sent, safe)
        # A leading space may depend on the token before, so the tail keeps a few tokens of context.
        if whole and len(self._ids) - self._start > 64:
            cut = len(self._ids) - 16
            context = self._tokenizer.decode(self._ids[cut:])
            if tail.endswith(context) and "\ufffd" not in context:
                self._settled += tail[: len(tail) - len(context)]
                self._start = cut
        return piece


def _held_back(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins a stop string."""
    longest = max((len(s) for s in stop), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(s.startswith(text[-length:]) for s in stop):
            return length
    return 0
