"""What a request may be before anything is done for it: its key, its size, its time, its form."""

import asyncio
import hashlib
import hmac
import json
import math
from collections.abc import Sequence

from starlette.requests import ClientDisconnect, Request

from jaxinfer.serve.errors import ApiError

DEEPEST = 64
"""Lists and objects in each other that a body may have."""


class Keys:
    """The API keys, of which only hashes are kept."""

    def __init__(self, keys: Sequence[str]):
        self._hashes = [_hash(key) for key in dict.fromkeys(keys)]

    def owner(self, request: Request) -> str:
        """Whose request this is: the number of its key, "" where there are no keys.

        All keys are compared, each in constant time, so that the time tells nothing about them.

        Raises:
          ApiError: 401, the key is missing or wrong.
        """
        if not self._hashes:
            return ""
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        hashed, found = _hash(given.strip()), None
        for number, known in enumerate(self._hashes):
            if hmac.compare_digest(hashed, known):
                found = number
        if found is None or scheme.lower() != "bearer":
            what = "is not valid" if given.strip() else "is missing"
            raise ApiError(
                401, f"the API key {what}; send Authorization: Bearer KEY", code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        return str(found)


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


async def read_object(request: Request, most: int, seconds: float) -> dict[str, object]:
    """The JSON object in a request's body.

    Args:
      most: bytes that it may have.
      seconds: time that it may take to arrive.

    Raises:
      ApiError: it is too large, too slow, or no JSON object.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # A web page of another origin may send other types without being asked.
        raise ApiError(415, "the body must be JSON; send Content-Type: application/json")
    try:
        async with asyncio.timeout(seconds):
            body = await _read(request, most)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {seconds:g} seconds") from None
    except ClientDisconnect:
        raise ApiError(400, "the body did not arrive whole") from None
    return parsed(body)


async def _read(request: Request, most: int) -> bytes:
    too_large = ApiError(413, f"the body exceeds {most} bytes; send less", code="body_too_large")
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length[:20]) > most:
        raise too_large
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > most:
            raise too_large
    return bytes(body)


def parsed(body: bytes) -> dict[str, object]:
    """The object that a body holds.

    Raises:
      ApiError: it is no JSON, no object, or too deep.
    """
    try:
        text = body.decode("utf-8")
        value = json.loads(text, parse_float=_finite, parse_constant=_finite)
        if "\\u" in text:  # an escape may spell half of a character
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        why = "too deep" if isinstance(error, RecursionError) else error
        raise ApiError(400, f"the body is not valid JSON: {why}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    level: list[object] = [value]
    for _ in range(DEEPEST):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return value
    raise ApiError(400, f"the body has more than {DEEPEST} levels", code="invalid_json")


def _inside(value: object) -> list[object]:
    if isinstance(value, dict):
        return [*value.values()]
    return value if isinstance(value, list) else []


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is beyond the numbers of JSON")
    return number
