"""Calls of tools in what a model writes, read while it is written.

A call is a JSON object with a name and its arguments. Hermes and other ChatML models write it
between `<tool_call>` and `</tool_call>`, anywhere in their answer; Llama 3 writes nothing but
calls, separated by semicolons. What looks like a call and is none, or calls what there is not, is
text.
"""

import json
import re
import secrets
from collections.abc import Collection
from typing import NamedTuple, Protocol, runtime_checkable

OPEN, CLOSE = "<tool_call>", "</tool_call>"
HEADER = re.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.){1,200}")\s*,'
    r'\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)


class Text(NamedTuple):
    """A piece of the answer itself."""

    text: str


class CallBegin(NamedTuple):
    """A call begins; its arguments follow."""

    number: int
    id: str
    name: str


class CallArguments(NamedTuple):
    """A piece of the JSON text of a call's arguments."""

    number: int
    text: str


Part = Text | CallBegin | CallArguments


@runtime_checkable
class Parser(Protocol):
    """Takes an answer apart."""

    def push(self, text: str, last: bool = False) -> list[Part]:
        """The parts that a piece of text completes; all that is left if it is the last."""
        ...


class PlainParser:
    """An answer without calls."""

    def push(self, text: str, last: bool = False) -> list[Part]:
        return [Text(text)] if text else []


class ObjectEnd:
    """Finds the end of a JSON object that is pushed in pieces."""

    def __init__(self):
        self._depth, self._quoted, self._escaped = 0, False, False

    def push(self, text: str) -> int | None:
        """Where in `text` the object has ended; None while it goes on."""
        for i, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped, self._quoted = character == "\\", character != '"'
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return i + 1
        return None


class Call:
    """One call, from its brace to its brace.

    Args:
      index: its number in the answer.
      names: the tools that there are.
    """

    def __init__(self, index: int, names: Collection[str]):
        self._index, self._names = index, names
        self._raw = ""  # before its name is known
        self._whole, self._arguments = ObjectEnd(), ObjectEnd()
        self.begun = False  # and is told
        self._tail = False  # the arguments have ended, not yet the call

    def push(self, text: str) -> tuple[list[Part], str | None]:
        """What `text` adds, and what of it follows the call; None while that goes on."""
        parts: list[Part] = []
        if not self.begun:
            before, self._raw = len(self._raw), self._raw + text
            header = HEADER.match(self._raw)
            if header is None or (name := _loaded(header[1])) not in self._names:
                end = self._whole.push(text)
                return ([], None) if end is None else self._at_once(before + end)
            self.begun, text = True, self._raw[header.end() :]
            parts.append(CallBegin(self._index, _identifier(), str(name)))
        if not self._tail:
            end = self._arguments.push(text)
            self._tail = end is not None
            parts += [CallArguments(self._index, text[:end])] if text else []
            text = "" if end is None else text[end:]
        if not self._tail or "}" not in text:
            return parts, None
        return parts, text.partition("}")[2]

    def rest(self) -> list[Part]:
        """What is left of a call that does not end."""
        return [] if self.begun else [Text(self._raw)]

    def _at_once(self, end: int) -> tuple[list[Part], str | None]:
        """The parts of a whole object that is written in another order, or that is no call."""
        text, rest = self._raw[:end], self._raw[end:]
        found = _loaded(text)
        if isinstance(found, dict) and found.get("name") in self._names:
            arguments = found.get("arguments", found.get("parameters", {}))
            if isinstance(arguments, dict):
                self.begun = True
                begin = CallBegin(self._index, _identifier(), str(found["name"]))
                written = json.dumps(arguments, ensure_ascii=False)
                return [begin, CallArguments(self._index, written)], rest
        return [Text(text)], rest


class HermesParser:
    """Calls between tags, and text around them."""

    def __init__(self, names: Collection[str]):
        self._names, self._count = names, 0
        self._text = ""  # not read yet
        self._call: Call | None = None
        self._closing = False  # behind a call, before its closing tag
        self._blanks = ""  # before its opening tag

    def push(self, text: str, last: bool = False) -> list[Part]:
        self._text += text
        parts: list[Part] = []
        while self._step(parts, last):
            pass
        if last and self._call is not None:
            parts += self._tagged(self._call.rest())
        return parts

    def _tagged(self, parts: list[Part]) -> list[Part]:
        """What turns out to be no call, with the tag that began it."""
        before = self._blanks + OPEN
        return [Text(before + part.text) if isinstance(part, Text) else part for part in parts]

    def _step(self, parts: list[Part], last: bool) -> bool:
        """Reads on; whether there may be more to read."""
        if self._call is not None:
            found, rest = self._call.push(self._text)
            begun, self._text = self._call.begun, rest or ""
            parts += found if begun else self._tagged(found)
            if rest is None:
                return False
            self._call, self._closing, self._count = None, begun, self._count + begun
            return True
        if self._closing:
            behind = self._text.lstrip()
            if CLOSE.startswith(behind) and behind != CLOSE and not last:
                return False
            self._text, self._closing = behind.removeprefix(CLOSE), False
            return True
        before, tag, after = self._text.partition(OPEN)
        if not tag and not last:
            held = _held(before)
            before, after = before[: len(before) - held], before[len(before) - held :]
        if tag:
            self._call = Call(self._count, self._names)
            kept = before.rstrip()
            before, self._blanks = kept, before[len(kept) :]
        if before.strip() or (before and not self._count):
            parts.append(Text(before))
        self._text = after
        return bool(tag)


class LlamaParser:
    """Calls and nothing else, or text and nothing else."""

    def __init__(self, names: Collection[str]):
        self._names, self._count = names, 0
        self._text = ""  # not read yet
        self._call: Call | None = None
        self._plain = False

    def push(self, text: str, last: bool = False) -> list[Part]:
        self._text += text
        parts: list[Part] = []
        while self._text:
            if self._plain:
                parts.append(Text(self._text))
                self._text = ""
                break
            if self._call is None:
                begin = self._text.lstrip("; \n" if self._count else None)
                self._plain = bool(begin) and not begin.startswith("{")
                if not begin:
                    break
                if not self._plain:
                    self._text, self._call = begin, Call(self._count, self._names)
                continue
            found, rest = self._call.push(self._text)
            parts, self._text = parts + found, rest or ""
            if rest is not None:
                self._count += self._call.begun
                self._plain, self._call = not self._call.begun, None
        if last and self._call is not None:
            parts += self._call.rest()
        return parts


def _held(text: str) -> int:
    """Characters at the end of a text that may begin a tag, with the blanks before them."""
    size = next(n for n in range(len(OPEN) - 1, -1, -1) if text.endswith(OPEN[:n]))
    kept = text[: len(text) - size]
    return len(text) - len(kept.rstrip())


def _loaded(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _identifier() -> str:
    return f"call_{secrets.token_hex(12)}"
