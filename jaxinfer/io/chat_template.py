"""Chat templates: jinja2 text from a checkpoint, and what it is rendered with.

What a template may use is what Hugging Face gives it: messages, tools, documents,
add_generation_prompt, the special tokens, further variables of the caller, raise_exception,
strftime_now, tojson, break/continue and the `generation` block. It is rendered in a process of
bounded time and memory (`template_process`). Every failure is a one-line `ValueError`.
"""

import dataclasses
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from jaxinfer.files import one_line
from jaxinfer.io import template_process

MAX_VALUES = 100_000
"""Entries of lists and mappings that one conversation may have, all together."""

MAX_BITS = 1024
"""Of an integer: Python writes no more than 4,300 digits."""

MAX_DEPTH = 100
"""Lists in lists; more of them is a list that holds itself."""

GIVEN = ("messages", "tools", "documents", "add_generation_prompt")
NEED_CONTENT = ("system", "developer", "user")
"""Roles whose messages say something; others may only call a tool."""


def render_chat(
    template: str,
    messages: object,
    *,
    add_generation_prompt: bool = True,
    tools: object = None,
    documents: object = None,
    variables: Mapping[str, object] | None = None,
) -> str:
    """The prompt that `template` makes of `messages`.

    Args:
      template: jinja2 text.
      messages: mappings with "role", "content" and whatever else the template reads.
      add_generation_prompt: end with the beginning of an answer.
      tools: mappings, each the JSON schema of a function that the model may call.
      documents: mappings such as {"title": ..., "text": ...} that the answer may cite.
      variables: what else the template reads, by name.

    Raises:
      ValueError: the messages have a wrong form; or the template failed, or took more than 2 s of
        processor time, 256 MB or 4 Mi characters.
    """
    values = template_values(messages, add_generation_prompt, tools, documents, variables)
    return render(template, values)


def render(template: str, values: Mapping[str, object]) -> str:
    """The text of `template` with `values` as `template_values` makes them."""
    if not isinstance(template, str):
        raise ValueError(f"a chat template must be a text, got {type(template).__name__}")
    try:
        return template_process.render(template, values)
    except template_process.Failure as failure:
        kind = f" ({one_line(failure.kind, 80)})" if failure.kind else ""
        raise ValueError(f"the chat template failed{kind}: {one_line(failure)}") from None


def template_values(
    messages: object,
    add_generation_prompt: bool = True,
    tools: object = None,
    documents: object = None,
    variables: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """What a template is rendered with, as JSON values; ValueError where something else is given.

    A key of a message whose value is None is left out, as Hugging Face does: templates ask whether
    a key is there.
    """
    check_messages(messages)
    plain = _Plain()
    values = plain.mapping(variables or {}, "variables")
    if taken := [name for name in GIVEN if name in values]:
        raise ValueError(f"variables must not hold {taken[0]!r}, which has an argument of its own")
    turns = [
        {
            name: value
            for name, value in plain.mapping(turn, f"message {i}").items()
            if value is not None
        }
        for i, turn in enumerate(messages)  # type: ignore[arg-type]
    ]
    return values | {
        "messages": turns,
        "tools": _mappings(plain, tools, "tools", "JSON schemas of functions"),
        "documents": _mappings(plain, documents, "documents", "{'title': ..., 'text': ...}"),
        "add_generation_prompt": bool(add_generation_prompt),
    }


def check_messages(messages: object) -> Sequence[Mapping[str, object]]:
    """The messages; ValueError unless they are a list of mappings with a role and a content.

    Only what the model or a tool said may lack a content: it can be a call of a tool.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(
            "messages must be a non-empty list of {'role': ..., 'content': ...}, "
            f"got {_shown(messages)}"
        )
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(
                f"message {index} must be a mapping with 'role' and 'content', "
                f"got {_shown(message)}"
            )
        content = message.get("content")
        if not isinstance(content, str | Sequence) and (
            content is not None or message["role"] in NEED_CONTENT
        ):
            raise ValueError(
                f"message {index} of {_shown(message['role'])} must be a mapping with 'role' and a "
                f"'content' that is a text or a list of parts, got {_shown(message)}"
            )
    return messages


def _mappings(plain: "_Plain", given: object, what: str, form: str) -> list[dict] | None:
    if given is None:
        return None
    if isinstance(given, str | Mapping) or not isinstance(given, Sequence):
        raise ValueError(f"{what} must be a list of {form}, got {_shown(given)}")
    for entry in given:
        if not isinstance(entry, Mapping):
            raise ValueError(f"{what} must be a list of {form}, got the entry {_shown(entry)}")
    return [plain.mapping(entry, what) for entry in given]


def texts_of(value: object) -> Iterator[str]:
    """Every text in a JSON value, names included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, entry in value.items():
            yield name
            yield from texts_of(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from texts_of(entry)


def with_texts(value: object, change: Callable[[str], str]) -> object:
    """A JSON value with every text changed, names included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(name): with_texts(entry, change) for name, entry in value.items()}
    if isinstance(value, list):
        return [with_texts(entry, change) for entry in value]
    return value


class _Plain:
    """JSON values of what a caller passes: numbers of numpy, enums, tuples, dataclasses."""

    def __init__(self):
        self.count = 0

    def mapping(self, given: Mapping[str, object], where: str, depth: int = 0) -> dict[str, object]:
        if not isinstance(given, Mapping):
            raise ValueError(f"{where} must be a mapping, got {_shown(given)}")
        return {self.name(key, where): self(value, where, depth) for key, value in given.items()}

    def name(self, key: object, where: str) -> str:
        if not isinstance(key, str):
            raise ValueError(f"{where}: names must be texts, got {_shown(key)}")
        return str.__str__(key)

    def __call__(self, value: object, where: str, depth: int) -> object:
        self.count += 1
        if self.count > MAX_VALUES or depth > MAX_DEPTH:
            limit = f"{MAX_DEPTH} levels" if depth > MAX_DEPTH else f"{MAX_VALUES} values"
            raise ValueError(f"{where}: more than {limit}; does something hold itself?")
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return str.__str__(value)  # a str of its own class, such as an enum, is its text
        if isinstance(value, int) and int(value).bit_length() <= MAX_BITS:
            return int(value)
        if isinstance(value, float):
            return float(value)
        if isinstance(value, np.generic) and isinstance(value.item(), bool | int | float | str):
            return value.item()
        if isinstance(value, Mapping):
            return self.mapping(value, where, depth + 1)
        if isinstance(value, list | tuple):
            return [self(entry, where, depth + 1) for entry in value]
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            return self.mapping(fields, where, depth + 1)
        raise ValueError(
            f"{where}: a template reads texts, numbers, lists and mappings, got {_shown(value)}"
        )


def _shown(value: object) -> str:
    """The beginning of a value; it may be large, or hold itself."""
    try:
        return one_line(_short.repr(value), 80)
    except ValueError:  # an integer of more digits than Python writes
        return f"a large {type(value).__name__}"


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80
