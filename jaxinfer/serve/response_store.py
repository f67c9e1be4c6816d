"""`ResponseStore`: answers of `/v1/responses` that may be asked for again, a bounded number."""

from collections import OrderedDict
from dataclasses import dataclass, field

from jaxinfer.serve.errors import ApiError
from jaxinfer.serve.generation import Generation
from jaxinfer.serve.response_writer import ResponseWriter
from jaxinfer.serve.schema import Message


@dataclass(eq=False)
class Stored:
    """An answer, whose it is, and the conversation up to and with it."""

    owner: str
    writer: ResponseWriter
    messages: list[Message] = field(default_factory=list)
    generation: Generation | None = None  # while it runs


class ResponseStore:
    """Stored answers by their ids; the oldest go first.

    Args:
      most: answers that are kept.
    """

    def __init__(self, most: int):
        self.most = most
        self._stored: OrderedDict[str, Stored] = OrderedDict()

    def put(self, identifier: str, stored: Stored) -> None:
        """Keeps an answer."""
        self._stored[identifier] = stored
        while len(self._stored) > self.most:
            self._stored.popitem(last=False)

    def get(self, identifier: str, owner: str, param: str | None = None) -> Stored:
        """An answer of an owner.

        Raises:
          ApiError: 404, the owner has no such answer, or not any more.
        """
        found = self._stored.get(identifier)
        if found is None or found.owner != owner:
            raise ApiError(
                404, f"there is no response {identifier!r}; older ones go when others come",
                param=param, code="response_not_found",
            )  # fmt: skip
        return found

    def drop(self, identifier: str) -> None:
        """Forgets an answer, if it is kept."""
        self._stored.pop(identifier, None)
