"""`ResponseWriter`: the response object of an answer while it grows, and the events about it."""

import time
import uuid
from collections.abc import Sequence

from jaxinfer.decode.ticket import RequestStats
from jaxinfer.serve.errors import ApiError
from jaxinfer.serve.tool_parser import CallArguments, CallBegin, Part, Text

Event = dict[str, object]


class ResponseWriter:
    """Takes the parts of an answer; every method returns the events that they are.

    Args:
      record: the response object, with what does not change.
    """

    def __init__(self, record: dict[str, object]):
        self._items: list[dict[str, object]] = []
        self.record = record | {"output": self._items}
        self._text = ""  # of the item that is open, or its arguments
        self._log_probs: list[object] = []
        self._number = 0

    def begin(self) -> list[Event]:
        """That it begins."""
        return [self._whole("created"), self._whole("in_progress")]

    def write(self, parts: Sequence[Part], log_probs: Sequence[object] = ()) -> list[Event]:
        """That it goes on."""
        events: list[Event] = []
        for part in parts:
            if isinstance(part, Text):
                events += self._open_message()
                self._text += part.text
                self._log_probs += log_probs
                inside = {"content_index": 0, "logprobs": [*log_probs]}
                events.append(self._of_item("output_text.delta", delta=part.text, **inside))
                log_probs = ()
            elif isinstance(part, CallBegin):
                events += self._close() + self._open(_call(part))
            elif isinstance(part, CallArguments):
                self._text += part.text
                events.append(self._of_item("function_call_arguments.delta", delta=part.text))
        return events

    def end(self, reason: str, stats: RequestStats) -> list[Event]:
        """That it has ended, and why, in the words of the batcher."""
        status = {"length": "incomplete", "cancelled": "cancelled"}.get(reason, "completed")
        events = self._close("completed" if status == "completed" else "incomplete")
        details = {"reason": "max_output_tokens"} if status == "incomplete" else None
        self.record |= {"status": status, "incomplete_details": details, "usage": _usage(stats)}
        if status == "completed":
            self.record["completed_at"] = int(time.time())
        return [*events, self._whole("incomplete" if status == "cancelled" else status)]

    def fail(self, error: ApiError) -> list[Event]:
        """That it has failed."""
        events = self._close("incomplete")
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        self.record |= {"status": "failed", "error": {"code": code, "message": str(error)}}
        return [*events, self._whole("failed")]

    def _open_message(self) -> list[Event]:
        if self._is_open and self._items[-1]["type"] == "message":
            return []
        item: dict[str, object] = {"id": f"msg_{uuid.uuid4().hex}", "type": "message"}
        item |= {"role": "assistant", "status": "in_progress", "content": []}
        events = self._close() + self._open(item)
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        return [*events, self._of_item("content_part.added", content_index=0, part=part)]

    def _open(self, item: dict[str, object]) -> list[Event]:
        self._items.append(item)
        self._text, self._log_probs = "", []
        index = len(self._items) - 1
        return [self._event("response.output_item.added", output_index=index, item=dict(item))]

    @property
    def _is_open(self) -> bool:
        return bool(self._items) and self._items[-1]["status"] == "in_progress"

    def _close(self, status: str = "completed") -> list[Event]:
        """Ends the item that is open."""
        if not self._is_open:
            return []
        item, text = self._items[-1], self._text
        item["status"] = status
        if item["type"] == "message":
            part = {"type": "output_text", "text": text, "annotations": []}
            part |= {"logprobs": self._log_probs}
            item["content"] = [part]
            place = {"content_index": 0}
            events = [
                self._of_item("output_text.done", text=text, logprobs=self._log_probs, **place),
                self._of_item("content_part.done", part=part, **place),
            ]
        else:
            item["arguments"] = text
            name = item["name"]
            events = [self._of_item("function_call_arguments.done", arguments=text, name=name)]
        index = len(self._items) - 1
        done = self._event("response.output_item.done", output_index=index, item=dict(item))
        return [*events, done]

    def _of_item(self, kind: str, **fields: object) -> Event:
        """An event of the last item."""
        place = {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}
        return self._event(f"response.{kind}", **place, **fields)

    def _whole(self, kind: str) -> Event:
        return self._event(f"response.{kind}", response=self.record | {"output": [*self._items]})

    def _event(self, kind: str, **fields: object) -> Event:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **fields}


def _call(begin: CallBegin) -> dict[str, object]:
    item: dict[str, object] = {"id": f"fc_{uuid.uuid4().hex}", "type": "function_call"}
    return item | {
        "call_id": begin.id, "name": begin.name, "arguments": "", "status": "in_progress",
    }  # fmt: skip


def _usage(stats: RequestStats) -> dict[str, object]:
    return {
        "input_tokens": stats.prompt_tokens,
        "input_tokens_details": {"cached_tokens": stats.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": stats.new_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": stats.prompt_tokens + stats.new_tokens,
    }
