"""Refusals and faults as the OpenAI API writes them: {"error": {message, type, param, code}}.

400 a request that is wrong, 401 no valid key, 404 no such thing, 413 a body that is too large, 415
no JSON, 422 a request that is right but that this model cannot follow, 429 a full queue, 503 a
server that is about to end, 504 an answer that took too long, 500 a fault of ours.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from starlette.responses import JSONResponse

from jaxinfer.files import one_line

KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
LONGEST = 1000  # characters of a message


class Json(JSONResponse):
    """JSON of any text: a lone surrogate, which a message may quote, becomes a question mark."""

    def render(self, content: object) -> bytes:
        return json_text(content).encode("utf-8", "replace")


def json_text(content: object) -> str:
    """A JSON value on one line."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


class ApiError(Exception):
    """What a client is told.

    Args:
      status: of HTTP.
      message: what was given, what was expected, and what to do.
      param: the field that is meant.
      code: a word for programs.
      headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: object,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(one_line(message, LONGEST))
        self.status, self.param, self.code = status, param, code
        self.headers = dict(headers or {})

    def record(self) -> dict[str, object]:
        """The error object."""
        kind = KINDS.get(self.status, "invalid_request_error")
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> Json:
        return Json(self.record(), self.status, headers=self.headers)


def unsupported(field: str, why: str = "this server does not have it; leave it out") -> ApiError:
    """The refusal of a field that cannot be honoured."""
    return ApiError(400, f"{field} is not supported: {why}", param=field, code="unsupported_value")


@contextmanager
def refusing(
    status: int = 400, param: str | None = None, code: str | None = None
) -> Iterator[None]:
    """What the library refuses inside is the client's matter."""
    try:
        yield
    except ValueError as error:
        raise ApiError(status, error, param=param, code=code) from error
