"""From JSON objects to the requests of `schema`, and what is wrong with them in one line."""

from collections.abc import Mapping
from typing import TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from jaxinfer.files import one_line
from jaxinfer.serve.errors import ApiError, unsupported
from jaxinfer.serve.schema import Body

Model = TypeVar("Model", bound=Body)


def validated(kind: type[Model], data: Mapping[str, object]) -> Model:
    """The request that a JSON object holds.

    Raises:
      ApiError: 400, a field is unknown, missing, of a wrong type or out of range; the first of
        these is named.
    """
    given = dict(data)
    for name, nothing in kind.REFUSED.items():
        if name in given and not _is_one(given.pop(name), nothing):
            raise unsupported(name)
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        places = [_place(one, given) for one in found]
        # Of the members of a union, that which fits best fails at the deepest place, and there not
        # for what it is.
        other = [one["type"] == "missing" or one["type"].endswith("_type") for one in found]
        worst = max(range(len(found)), key=lambda i: (len(places[i]), not other[i], -i))
        param = ".".join(map(str, places[worst])) or "body"
        unknown = found[worst]["type"] == "extra_forbidden"
        message = found[worst]["msg"]
        why = "this request has no such field" if unknown else message[:1].lower() + message[1:]
        code = "unknown_field" if unknown else "invalid_value"
        raise ApiError(400, f"{param}: {why}", param=one_line(param, 200), code=code) from None


def _is_one(value: object, known: tuple[object, ...]) -> bool:
    return any(value == one and type(value) is type(one) for one in known)


def _place(error: ErrorDetails, data: object) -> list[int | str]:
    """Where in the data an error is; pydantic names the members of unions too."""
    place: list[int | str] = []
    for part in error["loc"]:
        inner = _inside(data, part)
        is_missing = error["type"] == "missing" and part == error["loc"][-1]
        if inner or is_missing:
            place.append(part)
        data = inner[0] if inner else data
    return place


def _inside(data: object, part: int | str) -> list[object]:
    """The entry of an object or a list; none where it has no such entry."""
    if isinstance(data, dict):
        return [data[part]] if part in data else []
    if isinstance(data, list) and isinstance(part, int):
        return data[part : part + 1]
    return []
