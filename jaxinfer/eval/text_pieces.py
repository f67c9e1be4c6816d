"""Tokens of a text that comes in pieces, for texts that no memory holds."""

import re
from collections.abc import Iterable, Iterator

import numpy as np

from jaxinfer.decode.model import Model

BESIDE = 64  # characters on either side of a cut that must have the same tokens with and without it
CUT = re.compile(r"(?<=\S)(?= [^\W_])|(?<=\S\n)(?=[^\W_])")
CUTS_TRIED = 16  # per piece of text


def text_tokens(lm: Model, pieces: Iterable[str]) -> Iterator[np.ndarray]:
    """Yields i32[T], the tokens of a text that comes in pieces: exactly those of the whole text.

    Byte-level tokenizers split a text into words before all else. It is cut where they all do,
    before a space or behind a line break that stands between a visible character and a letter or
    digit, and only where the tokens beside the cut prove to be those without it. Of a text and
    tokenizer without such places everything is held until the end, else two pieces at most.
    """
    held: list[str] = []
    is_first = True

    def tokens(text: str) -> np.ndarray:
        return np.asarray(lm.encode(text, continues=not is_first), np.int32)

    for piece in pieces:
        cut = _cut(lm, piece)
        if cut is None:
            held.append(piece)
            continue
        yield tokens("".join(held) + piece[:cut])
        held, is_first = [piece[cut:]], False
    yield tokens("".join(held))


def _cut(lm: Model, text: str) -> int | None:
    """Where `text` may be cut, as far behind as possible; None if nowhere."""
    places = [found.start() for found in CUT.finditer(text, BESIDE, max(len(text) - BESIDE, 0))]
    for place in reversed(places[-CUTS_TRIED:]):
        before, after = text[place - BESIDE : place], text[place : place + BESIDE]
        apart = lm.encode(before) + lm.encode(after, continues=True)
        if apart == lm.encode(before + after):
            return place
    return None
