"""`Log`: one line per request on standard error, and what went wrong. No prompt, answer or key."""

import json
import sys
import time
import traceback

from jaxinfer.files import one_line


class Log:
    """Lines of a kind: "text", "json", or "off" but for faults."""

    def __init__(self, kind: str):
        self._kind = kind

    def request(self, method: str, path: str, status: int, seconds: float) -> None:
        """A request was answered."""
        if self._kind == "text":
            _print(f"{method} {one_line(path, 100)} {status} {seconds:.3f} s")
        elif self._kind == "json":
            self._json(
                event="request", method=method, path=one_line(path, 100), status=status,
                seconds=round(seconds, 6),
            )  # fmt: skip

    def event(self, text: str) -> None:
        """The server begins or ends something."""
        if self._kind == "json":
            self._json(event="server", message=text)
        elif self._kind == "text":
            _print(text)

    def fault(self, error: BaseException) -> None:
        """Something of ours is broken: where, not with which text."""
        places = "".join(traceback.format_tb(error.__traceback__))
        if self._kind == "json":
            self._json(event="fault", error=type(error).__name__, traceback=places)
        else:
            _print(f"fault: {type(error).__name__}\n{places}")

    def _json(self, **fields: object) -> None:
        _print(json.dumps({"time": round(time.time(), 3), **fields}))


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
