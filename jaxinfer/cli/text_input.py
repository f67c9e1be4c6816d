"""Text that a user gives as a file or pipes in: UTF-8, whose byte order mark is no part of it."""

import codecs
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from io import BufferedIOBase
from pathlib import Path
from typing import cast

LIMIT = 2**28  # bytes; a longer text is read in pieces, by `score --stream`
PIECE = 2**14  # bytes of a stream read at once


def opened(path: str) -> AbstractContextManager[BufferedIOBase]:
    """A file's bytes; `-` is standard input, which stays open."""
    if path != "-":
        return open(Path(path).expanduser(), "rb")
    if sys.stdin is None:
        raise ValueError("standard input is closed; give a file")
    return nullcontext(cast(BufferedIOBase, sys.stdin.buffer))


def pieces(file: BufferedIOBase, path: str) -> Iterator[str]:
    """Yields the text of a file in pieces.

    Raises:
      ValueError: it is not UTF-8.
    """
    decode = codecs.getincrementaldecoder("utf-8-sig")().decode
    read, data = 0, b"-"
    while data:
        data = file.read(PIECE)
        read += len(data)
        try:
            yield decode(data, not data)
        except UnicodeDecodeError as error:
            byte = read - len(error.object) + error.start
            raise ValueError(
                f"{_name(path)} is not UTF-8 text (byte {byte}); convert it first"
            ) from error


def read_text(path: str) -> str:
    """The text of a file.

    Raises:
      ValueError: it is not UTF-8, or too long.
      OSError: it cannot be read.
    """
    found, size = [], 0
    with opened(path) as file:
        for piece in pieces(file, path):
            found.append(piece)
            size += len(piece)
            if size > LIMIT:
                raise ValueError(f"{_name(path)} has more than {LIMIT} characters; shorten it")
    return "".join(found)


def read_prompt(path: str) -> str:
    """A prompt: a text without its last line's end, which editors and `echo` add."""
    text = read_text(path)
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text


def _name(path: str) -> str:
    return "standard input" if path == "-" else path
