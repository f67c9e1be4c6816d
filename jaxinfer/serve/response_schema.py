"""What `POST /v1/responses` may hold, and how it reads as a chat."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from jaxinfer.decode.state import LISTED
from jaxinfer.serve.schema import (
    AssistantMessage,
    Body,
    CalledFunction,
    ChatRequest,
    Count,
    Drawing,
    Function,
    FunctionName,
    Instruction,
    JsonObject,
    JsonSchema,
    Message,
    NamedTool,
    ObjectFormat,
    ResponseFormat,
    SchemaFormat,
    TextFormat,
    Tool,
    ToolCall,
    ToolMessage,
    UserMessage,
)

Status = Literal["in_progress", "completed", "incomplete"]
LOG_PROBS = "message.output_text.logprobs"


class InputText(Body):
    type: Literal["input_text", "output_text"]
    text: str
    annotations: Annotated[list[JsonObject], Field(max_length=0)] | None = None
    logprobs: list[JsonObject] | None = None


Parts = str | Annotated[list[InputText], Field(min_length=1)]


class InputMessage(Body):
    """A message, or what the server once answered."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Parts
    id: str | None = None
    status: Status | None = None


class InputCall(Body):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: Status | None = None


class InputCallOutput(Body):
    """What a tool has said."""

    type: Literal["function_call_output"]
    call_id: str
    output: Parts
    id: str | None = None
    status: Status | None = None


InputItem = InputMessage | InputCall | InputCallOutput


class FlatSchemaFormat(JsonSchema):
    type: Literal["json_schema"]


class TextConfig(Body):
    format: (
        Annotated[TextFormat | ObjectFormat | FlatSchemaFormat, Field(discriminator="type")] | None
    ) = None


class FlatTool(Function):
    type: Literal["function"]


class FlatNamedTool(FunctionName):
    type: Literal["function"]


class ObfuscationOptions(Body):
    include_obfuscation: Literal[False] = False


class ResponseRequest(Drawing):
    """`POST /v1/responses`."""

    REFUSED = {
        "access_programs": (None,),
        "background_options": (None,),
        "context_management": (None, []),
        "conversation": (None,),
        "image": (None,),
        "max_tool_calls": (None,),
        "moderation": (None,),
        "prompt": (None,),
        "prompt_cache_key": (None,),
        "prompt_cache_options": (None,),
        "prompt_cache_retention": (None,),
        "reasoning": (None,),
        "service_tier": (None, "auto", "default"),
        "truncation": (None, "disabled"),
    }

    input: str | Annotated[list[InputItem], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    background: bool | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=LISTED)
    stream_options: ObfuscationOptions | None = None
    metadata: (
        Annotated[
            dict[
                Annotated[str, StringConstraints(max_length=64)],
                Annotated[str, StringConstraints(max_length=512)],
            ],
            Field(max_length=16),
        ]
        | None
    ) = None
    text: TextConfig | None = None
    tools: list[FlatTool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | FlatNamedTool | None = None
    parallel_tool_calls: bool | None = None


def chat_of(body: ResponseRequest, messages: Sequence[Message]) -> ChatRequest:
    """The same request as a chat of these messages."""
    shared = {name: getattr(body, name) for name in Drawing.model_fields if name != "stream"}
    choice = body.tool_choice
    if isinstance(choice, FlatNamedTool):
        choice = NamedTool(type="function", function=FunctionName(name=choice.name))
    log_probs = LOG_PROBS in (body.include or ())
    return ChatRequest.model_construct(
        **shared,
        messages=list(messages),
        max_completion_tokens=body.max_output_tokens,
        logprobs=log_probs,
        top_logprobs=body.top_logprobs if log_probs else None,
        response_format=_format(body.text),
        tools=[Tool(type="function", function=_function(tool)) for tool in body.tools or ()],
        tool_choice=choice,
        parallel_tool_calls=body.parallel_tool_calls,
    )


def messages_of(given: str | Sequence[InputItem]) -> list[Message]:
    """An input as messages; the calls of one turn are in one message."""
    if isinstance(given, str):
        return [UserMessage(role="user", content=given)]
    found: list[Message] = []
    for item in given:
        if isinstance(item, InputMessage):
            found.append(_message(item))
        elif isinstance(item, InputCallOutput):
            text = _text(item.output)
            found.append(ToolMessage(role="tool", content=text, tool_call_id=item.call_id))
        else:
            function = CalledFunction(name=item.name, arguments=item.arguments)
            call = ToolCall(id=item.call_id, function=function)
            last = found[-1] if found else None
            if not isinstance(last, AssistantMessage):
                last = AssistantMessage(role="assistant")
                found.append(last)
            last.tool_calls = [*(last.tool_calls or ()), call]
    return found


def _message(item: InputMessage) -> Message:
    text = _text(item.content)
    if item.role == "user":
        return UserMessage(role="user", content=text)
    if item.role == "assistant":
        return AssistantMessage(role="assistant", content=text)
    return Instruction(role=item.role, content=text)


def _text(parts: Parts) -> str:
    return parts if isinstance(parts, str) else "".join(part.text for part in parts)


def _function(tool: FlatTool) -> Function:
    return Function(
        name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict
    )


def _format(text: TextConfig | None) -> ResponseFormat | None:
    form = None if text is None else text.format
    if not isinstance(form, FlatSchemaFormat):
        return form
    schema = JsonSchema.model_construct(name=form.name, schema_=form.schema_, strict=form.strict)
    return SchemaFormat.model_construct(type="json_schema", json_schema=schema)
