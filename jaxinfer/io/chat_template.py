"""Chat templates: jinja2 text from a checkpoint, rendered in a sandbox.

A template is somebody else's program, so it runs in jinja2's immutable sandbox, and the ways in
which a few characters could ask for gigabytes (repetition, padding, concatenation in a loop, long
ranges) are bounded. What a template may use is what Hugging Face gives it: messages, tools,
documents, add_generation_prompt, the special tokens, raise_exception, strftime_now, tojson,
break/continue and the `generation` block. Every failure is a one-line `ValueError`.
"""

import datetime
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxinfer.files import one_line

MAX_OUTPUT = 4 * 2**20
"""Characters that a template may write, or build in one string."""

MAX_STEPS = 200_000
"""Loop steps over `range` that one rendering may take, all loops together."""

_PADDING_METHODS = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "translate"})
_WIDE_FORMAT = re.compile(r"\d{4,}|\*|\{[^{}]*\{")
"""A width of four digits, or one that comes from an argument."""

_UNBOUNDED_FILTERS = ("center", "indent", "batch", "slice", "wordwrap", "xmlattr")


def render_chat(
    template: str,
    messages: object,
    *,
    add_generation_prompt: bool = True,
    variables: Mapping[str, object] | None = None,
) -> str:
    """The prompt that `template` makes of `messages` (mappings with "role" and "content")."""
    turns = check_messages(messages)
    try:
        compiled = _compile(template)
        _budget(compiled)
        pieces = compiled.generate(
            messages=[dict(turn) for turn in turns],
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **(variables or {}),
        )
        return "".join(_bounded(pieces))
    except Exception as error:
        # a template can raise whatever its expressions raise (TypeError, KeyError, ...)
        raise ValueError(
            f"the chat template failed ({type(error).__name__}): {one_line(error)}"
        ) from error


def check_messages(messages: object) -> Sequence[Mapping[str, object]]:
    """The messages; ValueError unless they are a list of mappings with a role and a content."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(
            "messages must be a non-empty list of {'role': ..., 'content': ...}, "
            f"got {one_line(repr(messages), 80)}"
        )
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ValueError(
                f"message {index} must be a mapping with 'role' and 'content', "
                f"got {one_line(repr(message), 80)}"
            )
    return messages


def _bounded(pieces: Iterable[str]) -> Iterable[str]:
    total = 0
    for piece in pieces:
        total += len(piece)
        _check_size(total)
        yield piece


def _check_size(size: int) -> None:
    if size > MAX_OUTPUT:
        raise ValueError(f"it builds a text of more than {MAX_OUTPUT} characters")


def _budget(compiled: Any) -> None:
    """Give this rendering its own `range` and its own string concatenation."""
    steps = 0

    def limited_range(*args: int) -> range:
        nonlocal steps
        result = range(*args)
        steps += len(result)
        if steps > MAX_STEPS:
            raise ValueError(f"it loops over more than {MAX_STEPS} numbers")
        return result

    def limited_join(parts: Iterable[Any]) -> str:
        texts = [str(part) for part in parts]
        _check_size(sum(map(len, texts)))
        return "".join(texts)

    compiled.globals["range"] = limited_range
    # the `~` operator is not among the operators that the sandbox can intercept
    compiled.root_render_func.__globals__["str_join"] = limited_join
    compiled.root_render_func.__globals__["markup_join"] = limited_join


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> Any:
    _check_size(len(template))
    return _environment().from_string(template)


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple) else 0


def _sandbox() -> Any:
    """The class of a sandbox in which no operation makes much out of little."""
    import jinja2.sandbox

    class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"+", "*", "**", "%"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "+":
                _check_size(_size(left) + _size(right))
            elif operator == "*":
                for text, times in ((left, right), (right, left)):
                    if _size(text) and isinstance(times, int):
                        _check_size(_size(text) * times)
            elif operator == "%" and isinstance(left, str):
                _check_format(left)
            if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
                bits = left.bit_length() * (right if operator == "**" else 1)
                _check_size(bits + right.bit_length())
            return super().call_binop(context, operator, left, right)

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            if isinstance(obj, str) and attr in _PADDING_METHODS:
                return False
            return super().is_safe_attribute(obj, attr, value)

        def wrap_str_format(self, value: Any) -> Any:
            if isinstance(getattr(value, "__self__", None), str):
                _check_format(value.__self__)
            return super().wrap_str_format(value)

        def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
            owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
            if isinstance(owner, str) and name == "replace":
                _check_replace(owner, args)
            result = super().call(context, obj, *args, **kwargs)
            _check_size(_size(result))
            return result

    return Environment


def _generation_tag() -> Any:
    import jinja2.ext

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks assistant text for training; its body is rendered as is."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation


@functools.cache
def _environment() -> Any:
    env = _sandbox()(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _generation_tag()],
    )
    for name in _UNBOUNDED_FILTERS:
        env.filters.pop(name, None)
    env.filters["replace"] = _limited_replace(env.filters["replace"])
    env.filters["format"] = _limited_format
    env.filters["join"] = _limited_join(env.filters["join"])
    env.filters["tojson"] = _to_json
    env.globals["raise_exception"] = _raise
    env.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    env.globals.pop("lipsum", None)
    return env


def _check_format(form: str) -> None:
    if "{" in form or "%" in form:
        fields = re.findall(r"\{[^{}]*[{}]|%[^a-zA-Z%]*", form)
        if any(_WIDE_FORMAT.search(part) for part in fields):
            raise ValueError("it formats with a width that is too large or not a constant")


def _check_replace(text: str, args: Sequence[Any]) -> None:
    if len(args) >= 2 and isinstance(args[0], str) and isinstance(args[1], str):
        _check_size(len(text) + text.count(args[0]) * len(args[1]))


def _limited_replace(plain: Any) -> Any:
    @functools.wraps(plain)
    def replace(eval_context: Any, text: str, old: str, new: str, count: int | None = None) -> str:
        _check_replace(str(text), (old, new))
        return plain(eval_context, text, old, new, count)

    return replace


def _limited_join(plain: Any) -> Any:
    @functools.wraps(plain)
    def join(eval_context: Any, value: Any, d: str = "", attribute: Any = None) -> str:
        parts = list(value)
        _check_size(sum(_size(part) + len(d) for part in parts))
        return plain(eval_context, parts, d, attribute)

    return join


def _limited_format(value: Any, *args: Any, **kwargs: Any) -> str:
    _check_format(str(value))
    return str(value) % (kwargs or args)


def _raise(message: str) -> None:
    raise ValueError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any
) -> str:
    if indent is not None and not 0 <= indent <= 16:
        raise ValueError(f"tojson(indent={indent}) is out of range 0..16")
    known = {key: options[key] for key in ("separators", "sort_keys") if key in options}
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **known)
