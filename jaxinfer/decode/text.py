"""Tokens to text while they arrive: whole UTF-8 characters only, stop strings across token
borders. Time and memory per token do not grow with the text."""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from jaxinfer.typing import Tokenizer

SHORT = 64  # tokens that are decoded together; beyond, the older ones are dropped
CONTEXT = 16  # tokens that stay then: a leading space may depend on the token before
LONGEST = 256  # tokens without one whole character are text as they are


@runtime_checkable
class Decoder(Protocol):
    """What text needs of a tokenizer."""

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str: ...


class TextStream:
    """Turns one row's tokens into text pieces.

    A piece never ends inside a character, nor inside what may become a stop string. `stopped` is
    set when a stop string appeared; the text ends before it. Of the pieces that were sent, `kept`
    are remembered (None: all).
    """

    def __init__(self, tokenizer: Decoder, stop: Sequence[str] = (), kept: int | None = None):
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(s for s in stop if s)
        self._ids: list[int] = []  # the newest tokens
        self._taken = 0  # characters of their text that were taken from it
        self._held = ""  # taken, but not sent: it may begin a stop string
        self._sent: deque[str] = deque(maxlen=kept)

    @property
    def text(self) -> str:
        """All of the text that is remembered, with what is held back."""
        return "".join(self._sent) + self._held

    def push(self, ids: Sequence[int], last: bool = False) -> str:
        """The text that `ids` completed; with `last` also what was held back."""
        if self.stopped:
            return ""
        text = self._held + self._decoded(ids, last)
        found = [at for at in (text.find(s) for s in self._stop) if at >= 0]
        if found:
            self.stopped, piece, self._held = True, text[: min(found)], ""
        else:
            safe = len(text) - (0 if last else _held_back(text, self._stop))
            piece, self._held = text[:safe], text[safe:]
        if piece:
            self._sent.append(piece)
        return piece

    def _decoded(self, ids: Sequence[int], last: bool) -> str:
        """The characters that `ids` completed."""
        hopeless = len(self._ids) > LONGEST
        self._ids.extend(ids)
        tail = self._tokenizer.decode(self._ids)
        whole = last or hopeless or not tail.endswith("\ufffd")
        if not whole:
            tail = tail.rstrip("\ufffd")
        new = tail[self._taken :]
        self._taken = max(self._taken, len(tail))
        if whole and len(self._ids) > SHORT:
            self._drop_old(tail, hopeless)
        return new

    def _drop_old(self, tail: str, hopeless: bool) -> None:
        """Keeps a few tokens of context that begin with a character, if there are such."""
        first = len(self._ids) - CONTEXT
        for cut in range(first, first + 4):  # a character has four bytes, so four tokens, at most
            context = self._tokenizer.decode(self._ids[cut:])
            if hopeless or (tail.endswith(context) and "\ufffd" not in context):
                self._ids, self._taken = self._ids[cut:], len(context)
                return


def special_tokens(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, int]:
    """The ids of those texts that are one special token each, which decoded text does not show."""
    found = {}
    for text in texts:
        try:
            ids = tokenizer.encode(text, add_special=False)
        except ValueError:  # no text that the tokenizer can write
            continue
        hidden = len(ids) == 1 and not tokenizer.decode(ids)
        if hidden and tokenizer.decode(ids, skip_special=False) == text:
            found[text] = ids[0]
    return found


def _held_back(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins a stop string."""
    longest = max((len(s) for s in stop), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(s.startswith(text[-length:]) for s in stop):
            return length
    return 0
