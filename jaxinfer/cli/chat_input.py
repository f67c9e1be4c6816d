"""The messages of a chat: lines of standard input, or several lines between triple quotes."""

import codecs
import contextlib
import sys
from collections.abc import Iterable, Iterator

from jaxinfer.cli.notices import note

FENCE = '"""'


def messages(lines: Iterable[str]) -> Iterator[str]:
    """Joins the lines from one that begins with triple quotes to one that ends with them."""
    block: list[str] | None = None
    for line in lines:
        text = line.rstrip("\r\n")
        if block is None and text.lstrip().startswith(FENCE):
            block, text = [], text.lstrip().removeprefix(FENCE)
        if block is None:
            yield text
            continue
        if text.rstrip().endswith(FENCE):
            yield "\n".join([*block, text.rstrip().removesuffix(FENCE)])
            block = None
        else:
            block.append(text)
    if block is not None:  # the input ended first
        yield "\n".join(block)


def piped_lines() -> Iterator[str]:
    """The lines of standard input that is no terminal, without a byte order mark.

    Raises:
      ValueError: it is not UTF-8 text.
    """
    decode = codecs.getincrementaldecoder("utf-8-sig")().decode
    try:
        for line in sys.stdin.buffer:
            yield decode(line)
        decode(b"", True)
    except UnicodeDecodeError:
        raise ValueError("standard input is not UTF-8 text; convert it first") from None


def typed_lines() -> Iterator[str]:
    """The lines that a user types. Ctrl-C drops the line begun, a second one right behind it ends.

    Raises:
      KeyboardInterrupt: at the second Ctrl-C.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (line editing for input())
    prompt, interrupted = "> ", False
    if not sys.stdout.isatty():  # the answers go elsewhere: the prompt does not belong there
        prompt = ""
    while True:
        if not prompt:
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = input(prompt)
        except EOFError:
            print(file=sys.stderr)
            return
        except UnicodeDecodeError:
            note("error: the line is not UTF-8 text")
            continue
        except KeyboardInterrupt:
            print(file=sys.stderr)
            if interrupted:
                raise
            note("(Ctrl-C again or Ctrl-D ends the chat)")
            interrupted = True
            continue
        interrupted = False
        yield line
