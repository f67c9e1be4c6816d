"""What the fields of a configuration hold, checked by their annotations: files are not trusted."""

import dataclasses
import functools
import reprlib
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

LARGEST = 2**31 - 1
"""Of all integers."""


def known_fields(cls: type, data: Any) -> dict[str, Any]:
    """Keyword arguments for a dataclass, every list a tuple and every object a
    dataclass; none unknown, none missing."""
    require(
        isinstance(data, dict),
        f"{cls.__name__} must be an object of fields, got {reprlib.repr(data)}",
    )
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(data) - set(fields))
    require(not unknown, f"unknown config fields {unknown}; known are {sorted(fields)}")
    missing = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and name not in data
    ]
    require(not missing, f"config fields {missing} are missing")
    return {name: _read(value, _hints(cls)[name]) for name, value in data.items()}


def _read(value: Any, kind: Any) -> Any:
    """A parsed value as a field of this kind holds it: lists as tuples, objects as dataclasses
    where they are none yet."""
    for part in get_args(kind) if isinstance(kind, UnionType) else (kind,):
        if dataclasses.is_dataclass(part) and not (value is None or isinstance(value, part)):  # type: ignore[arg-type]
            return part(**known_fields(part, value))  # type: ignore[operator]
    return tuple(value) if isinstance(value, list) else value


def check_types(config: Any) -> None:
    """Raise unless every field of a dataclass holds a value of its annotated type."""
    for name, kind in _hints(type(config)).items():
        value = getattr(config, name)
        require(_is_a(value, kind), f"{name} must be {_expected(kind)}, got {reprlib.repr(value)}")


_hints = functools.cache(get_type_hints)
_EXPECTED = {
    bool: "true or false",
    float: "a finite number",
    int: "a 32-bit integer",
    str: "a text",
    dict: "an object",
    NoneType: "null",
}


def _is_a(value: Any, kind: Any) -> bool:
    """`isinstance` that knows Literal, unions and tuples; an integer will do for a float."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return isinstance(value, str) and value in parts
    if origin is UnionType:
        return any(_is_a(value, part) for part in parts)
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_a(item, parts[0]) for item in value)
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, int):
        return kind in (int, float) and abs(value) <= LARGEST
    if isinstance(value, float):
        return kind is float and abs(value) < 1e38
    return isinstance(value, kind)


def _expected(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, parts))
    if origin is UnionType:
        return " or ".join(map(_expected, parts))
    if origin is tuple:
        return f"a list of ({_expected(parts[0])})"
    return _EXPECTED.get(kind, f"a {kind.__name__}")


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
