"""Conversations as chat templates read them."""

import json
from collections.abc import Mapping, Sequence

from jaxinfer.serve.context import Context
from jaxinfer.serve.errors import ApiError, refusing
from jaxinfer.serve.schema import (
    AssistantMessage,
    Content,
    Message,
    Tool,
    ToolCall,
    ToolMessage,
)


def chat_tokens(
    context: Context,
    messages: Sequence[Message],
    tools: Sequence[Tool] | None = None,
    variables: Mapping[str, object] | None = None,
) -> list[int]:
    """The tokens of a conversation in the model's chat template.

    Raises:
      ApiError: 422, the model has no template, or it refuses the conversation.
    """
    turns = [_turn(context, message, i) for i, message in enumerate(messages)]
    given = [tool.model_dump(exclude_none=True) for tool in tools] if tools else None
    with refusing(422, "messages", "template_failed"):
        return context.batcher.model.chat_tokens(turns, tools=given, variables=variables)


def _turn(context: Context, message: Message, index: int) -> dict[str, object]:
    """One message as templates know it: text instead of parts, calls with objects."""
    turn: dict[str, object] = {"role": message.role, "content": text_of(message.content)}
    template = context.vocabulary.tokenizer.chat_template or ""
    if message.role == "developer" and "developer" not in template:
        turn["role"] = "system"  # what it is called there
    if isinstance(message, ToolMessage):
        turn["tool_call_id"] = message.tool_call_id
    elif message.name is not None:
        turn["name"] = message.name
    if isinstance(message, AssistantMessage):
        if message.tool_calls:
            turn["tool_calls"] = [
                _call(call, f"messages.{index}.tool_calls.{i}")
                for i, call in enumerate(message.tool_calls)
            ]
        elif message.content is None:
            raise ApiError(
                400, f"messages.{index}: an assistant's message needs content or tool_calls",
                param=f"messages.{index}.content",
            )  # fmt: skip
    return turn


def text_of(content: Content | None) -> str | None:
    """The text of a content; its parts follow each other."""
    if content is None or isinstance(content, str):
        return content
    return "".join(part.text for part in content)


def _call(call: ToolCall, where: str) -> dict[str, object]:
    """A call with its arguments as an object, which templates write as they need it."""
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        param = f"{where}.function.arguments"
        raise ApiError(400, f"{param}: it must be the text of a JSON object", param=param)
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}
