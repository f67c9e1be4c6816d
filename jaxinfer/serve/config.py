"""`ServeConfig`: what a server is told beside its batcher."""

import math
from dataclasses import dataclass, field

from jaxinfer.arguments import flag, of_kind, one_of, real, shown, whole

SCOPES = ("key", "shared", "off")
LOGS = ("text", "json", "off")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Names, keys and limits of a server.

    Args:
      name: the model's name in requests and answers; None is the model's own.
      api_keys: one of these must come with every request (`Authorization: Bearer KEY`); without
        any, everybody is served.
      max_tokens: tokens of an answer at most; None is what the context leaves.
      timeout_s: seconds that an answer may take, its time in the queue included.
      body_bytes: of a request's body, at most.
      body_s: seconds that a request's body may take to arrive.
      send_s: seconds that a reader of a stream may take for one event.
      cors_origins: web pages that may use the server, such as "https://example.org"; "*" for all.
      prefixes: who shares what was read of prompts that begin alike: those of one API key ("key"),
        all ("shared"), nobody ("off"). It needs a batcher with `prefix_bytes`.
      stored: answers of `/v1/responses` that are kept, the oldest first to go.
      drain_s: seconds for which running requests go on when the server is told to end.
      warmup: compile everything before `/ready` says so.
      log: a line per request on standard error, as "text" or "json", or "off". Neither prompts nor
        answers nor keys are logged.

    Raises:
      ValueError: a value is wrong.
    """

    name: str | None = None
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    max_tokens: int | None = None
    timeout_s: float = 600.0
    body_bytes: int = 2**20
    body_s: float = 30.0
    send_s: float = 60.0
    cors_origins: tuple[str, ...] = ()
    prefixes: str = "key"
    stored: int = 1000
    drain_s: float = 30.0
    warmup: bool = True
    log: str = "off"

    def __post_init__(self):
        if self.name is not None:
            of_kind("name", self.name, str, "a text")
        for name in ("api_keys", "cors_origins"):
            given = getattr(self, name)
            if isinstance(given, str) or not all(isinstance(one, str) and one for one in given):
                expected = f"{name} must be texts, none of them empty"
                raise ValueError(expected if name == "api_keys" else f"{expected}: {shown(given)}")
            object.__setattr__(self, name, tuple(given))
        if self.max_tokens is not None:
            whole("max_tokens", self.max_tokens)
        whole("body_bytes", self.body_bytes, most=2**40)
        whole("stored", self.stored, least=0)
        for name in ("timeout_s", "body_s", "send_s", "drain_s"):
            least = 0.0 if name == "drain_s" else math.ulp(0.0)
            value = real(name, getattr(self, name), least=least, most=1e9)
            object.__setattr__(self, name, value)
        one_of("prefixes", self.prefixes, SCOPES)
        one_of("log", self.log, LOGS)
        flag("warmup", self.warmup)
