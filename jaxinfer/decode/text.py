"""Tokens to text while they arrive: whole UTF-8 characters only, read behind the text that they
continue, stop strings across token borders. Time and memory per token do not grow with the text."""

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import compress, takewhile
from os.path import commonprefix
from typing import Protocol, runtime_checkable

from jaxinfer.typing import Tokenizer

SHORT = 64  # tokens that are decoded together; beyond, the older ones are dropped
CONTEXT = 16  # tokens that stay then: a leading space may depend on the token before
LONGEST = 256  # tokens without one whole character are text as they are
BYTES = 4  # of a character at most, and so its tokens
UNKNOWN = "\ufffd"  # what decoders write for bytes that are no character, or not yet


@runtime_checkable
class Decoder(Protocol):
    """What text needs of a tokenizer."""

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str: ...


class SpecialNames(dict[int, str]):
    """The text of each special token, which decoded text does not show; "" of other tokens."""

    def __init__(self, tokenizer: Decoder):
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, token: int) -> str:
        shown = self._tokenizer.decode([token])
        self[token] = "" if shown else self._tokenizer.decode([token], skip_special=False)
        return self[token]


class TextStream:
    """Turns one row's tokens into text pieces.

    The text is what decoding all of `before` and the tokens adds to the decoding of `before`: many
    decoders treat the first token of a text in a way of its own, and a character may begin before.
    A piece never ends inside a character, nor inside what may become a stop string. `stopped` is
    set when a stop string appeared; the text ends before it. Stop strings are looked for in the
    text itself, not in what it continues, with special tokens by name. Of the pieces that were
    sent, `kept` are remembered (None: all).

    Args:
      before: the tokens that are continued.
      owed: the last tokens of `before`, special ones not counted, of which an earlier stream sent
        nothing: `TextStream.owed` of that.
      goes_on: a character that the last token leaves unfinished is sent by the next stream.
    """

    def __init__(
        self,
        tokenizer: Decoder,
        stop: Sequence[str] = (),
        kept: int | None = None,
        *,
        before: Sequence[int] = (),
        owed: int = 0,
        goes_on: bool = False,
        names: SpecialNames | None = None,
    ):
        self.stopped = False
        self._tokenizer, self._goes_on = tokenizer, goes_on
        self._stop = tuple(s for s in stop if s)
        self._names = SpecialNames(tokenizer) if names is None else names
        self._ids = self._context(before)  # the newest tokens
        text = tokenizer.decode(self._ids[: len(self._ids) - owed])
        self._taken = len(text)  # characters that are not new
        self._before = text if text.endswith(UNKNOWN) else ""  # may end inside a character
        self._held, self._shown = "", b""  # not sent, as it may begin a stop string; 1: shown
        self._sent: deque[str] = deque(maxlen=kept)

    @property
    def text(self) -> str:
        """All of the text that is remembered, with what is held back."""
        return "".join([*self._sent, *compress(self._held, self._shown)])

    @property
    def owed(self) -> int:
        """The last tokens, special ones not counted, that began a character which is not whole."""
        if self.stopped:
            return 0
        sizes = range(len(self._ids), 0, -1)
        behind = (len(self._tokenizer.decode(self._ids[:size])) > self._taken for size in sizes)
        return sum(takewhile(bool, behind))

    def push(self, ids: Sequence[int], last: bool = False) -> str:
        """The text that `ids` completed; with `last` also what was held back."""
        if self.stopped:
            return ""
        text, shown = self._held, self._shown
        for new, is_shown in self._parts(ids, last):
            text, shown = text + new, shown + bytes([is_shown]) * len(new)
        found = [at for at in (text.find(s) for s in self._stop) if at >= 0]
        if found:
            self.stopped, end = True, min(found)
            self._held, self._shown = "", b""
        else:
            end = len(text) - (0 if last else _held_back(text, self._stop))
            self._held, self._shown = text[end:], shown[end:]
        piece = "".join(compress(text[:end], shown))
        if piece:
            self._sent.append(piece)
        return piece

    def _context(self, before: Sequence[int]) -> list[int]:
        """The newest tokens of `before` that show, from the first byte of a character on."""
        newest: list[int] = []
        for token in reversed(before):
            if len(newest) == CONTEXT + BYTES:
                break
            if not self._names[token]:
                newest.insert(0, token)
        cut = range(1, BYTES + 1) if len(newest) == CONTEXT + BYTES else ()
        for first in cut:
            if not self._tokenizer.decode(newest[first:]).startswith(UNKNOWN):
                return newest[first:]
        return newest

    def _parts(self, ids: Sequence[int], last: bool) -> Iterable[tuple[str, bool]]:
        """What `ids` add, in order: text that is shown, and the names of special tokens."""
        run: list[int] = []
        for token in ids:
            name = self._names[token]
            if not name:
                run.append(token)
            elif self._stop:  # nobody else asks for names
                yield self._decoded(run, last=False), True
                yield name, False
                run = []
        yield self._decoded(run, last), True

    def _decoded(self, ids: Sequence[int], last: bool) -> str:
        """The characters that `ids` completed."""
        hopeless = len(self._ids) > LONGEST
        self._ids.extend(ids)
        tail = self._tokenizer.decode(self._ids)
        if not tail.startswith(self._before):  # a character that began there is whole now
            self._taken, self._before = len(commonprefix([self._before, tail])), ""
        whole = not tail.endswith(UNKNOWN) or (last and not self._goes_on)
        end = len(tail if whole else tail.rstrip(UNKNOWN))
        if hopeless and not whole:
            end = max(end, len(self._tokenizer.decode(self._ids[:-BYTES])))
        new = tail[self._taken : end]
        self._taken = max(self._taken, end)
        if len(self._ids) > SHORT and (whole or hopeless):
            self._drop_old(tail, hopeless)
        return new

    def _drop_old(self, tail: str, hopeless: bool) -> None:
        """Keeps a few tokens of context that begin with a character, if there are such."""
        waiting = max(len(tail) - self._taken, 0)
        first = len(self._ids) - CONTEXT
        for cut in range(first, first + BYTES):
            context = self._tokenizer.decode(self._ids[cut:])
            good = context and tail.endswith(context) and UNKNOWN not in context
            if good or (hopeless and tail.endswith(context)) or (hopeless and cut == first + 3):
                self._ids, self._before = self._ids[cut:], ""
                self._taken = max(len(context) - waiting, 0)
                return


def special_tokens(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, int]:
    """The ids of those texts that are one special token each, which decoded text does not show."""
    found = {}
    for text in texts:
        try:
            ids = tokenizer.encode(text, add_special=False)
        except ValueError:  # no text that the tokenizer can write
            continue
        if len(ids) == 1 and text and SpecialNames(tokenizer)[ids[0]] == text:
            found[text] = ids[0]
    return found


def _held_back(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins a stop string."""
    longest = max((len(s) for s in stop), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(s.startswith(text[-length:]) for s in stop):
            return length
    return 0
