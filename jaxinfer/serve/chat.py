"""`POST /v1/chat/completions`: the next turn of a conversation."""

import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from jaxinfer.decode.ticket import Answer, Piece
from jaxinfer.serve.context import Context
from jaxinfer.serve.errors import ApiError, Json
from jaxinfer.serve.generation import REASONS, Generation, usage_of
from jaxinfer.serve.grammar import Grammar, grammar_of
from jaxinfer.serve.logprobs import for_chat
from jaxinfer.serve.messages import chat_tokens
from jaxinfer.serve.options import Options, answer_limit, options_of
from jaxinfer.serve.schema import ChatRequest
from jaxinfer.serve.stream import Events
from jaxinfer.serve.tool_parser import CallArguments, CallBegin, Parser, Part, Text
from jaxinfer.serve.tools import tools_of


@dataclass(frozen=True)
class Prepared:
    """A conversation, ready to be submitted: its prompt, what its answers must follow, and what
    takes them apart."""

    prompt: list[int]
    opts: Options
    grammar: Grammar | None
    parser: Callable[[], Parser]

    @classmethod
    def of(cls, context: Context, body: ChatRequest, owner: str) -> "Prepared":
        """What a request asks for.

        Raises:
          ApiError: it contradicts itself, or the model cannot follow it.
        """
        if body.stream_options is not None and not body.stream:
            raise ApiError(400, "stream_options need stream", param="stream_options")
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs need logprobs", param="top_logprobs")
        tools = tools_of(context, body)
        grammar = tools.grammar or grammar_of(context.vocabulary, body)
        prompt = chat_tokens(context, body.messages, tools.shown, body.chat_template_kwargs)
        if not prompt:
            raise ApiError(422, "the chat template makes no prompt of this", param="messages")
        asked = body.max_completion_tokens or body.max_tokens
        limit = answer_limit(context, [prompt], asked)
        opts = options_of(context, body, owner, limit, top_logprobs=body.top_logprobs or 0)
        return cls(prompt, opts, grammar, tools.parser)

    async def start(self, context: Context, count: int = 1) -> Generation:
        """Submits it, for `count` answers."""
        follow = None if self.grammar is None else self.grammar.follow
        return await Generation.start(context, [self.prompt], self.opts, count, follow)


async def chat(context: Context, request: Request, body: ChatRequest, owner: str) -> Response:
    """Answers a request."""
    prepared = await run_in_threadpool(Prepared.of, context, body, owner)
    generation = await prepared.start(context, body.n or 1)
    frame = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": context.name,
        "system_fingerprint": context.fingerprint,
    }
    if body.stream:
        frame |= {"object": "chat.completion.chunk"}
        return Events(context, generation, _chunks(context, body, prepared, generation, frame))
    answers = await generation.answers(request)
    choices = [
        _choice(context, body, prepared.parser(), answer) | {"index": index}
        for index, answer in enumerate(answers)
    ]
    usage = usage_of([answer.stats for answer in answers], len(answers))
    frame |= {"object": "chat.completion"}
    return Json(frame | {"choices": choices, "usage": usage})


def _choice(
    context: Context, body: ChatRequest, parser: Parser, answer: Answer
) -> dict[str, object]:
    text, calls = message_of(parser.push(answer.text, last=True))
    message: dict[str, object] = {"role": "assistant", "content": text, "refusal": None}
    reason = REASONS.get(answer.finish_reason, answer.finish_reason)
    if calls:
        message |= {"content": text or None, "tool_calls": [_call(*call) for call in calls]}
        reason = "tool_calls" if reason == "stop" else reason
    log_probs = for_chat(context.vocabulary, answer) if body.logprobs else None
    return {"message": message, "logprobs": log_probs, "finish_reason": reason}


def message_of(parts: Iterable[Part]) -> tuple[str, list[tuple[CallBegin, str]]]:
    """The text of an answer, and its calls with their arguments."""
    text, begins, arguments = "", [], []
    for part in parts:
        if isinstance(part, Text):
            text += part.text
        elif isinstance(part, CallBegin):
            begins.append(part)
            arguments.append("")
        else:
            arguments[-1] += part.text
    return text, list(zip(begins, arguments, strict=True))


async def _chunks(
    context: Context,
    body: ChatRequest,
    prepared: Prepared,
    generation: Generation,
    frame: dict[str, object],
) -> AsyncIterator[dict[str, object]]:
    """The events of a stream."""
    usage = body.stream_options is not None and body.stream_options.include_usage
    frame |= {"usage": None} if usage else {}

    def chunk(
        index: int, delta: dict[str, object], reason: str | None = None, found: object = None
    ) -> dict[str, object]:
        choice = {"index": index, "delta": delta, "logprobs": found, "finish_reason": reason}
        return frame | {"choices": [choice]}

    parsers = [prepared.parser() for _ in generation.tickets]
    called: set[int] = set()
    for index in range(len(parsers)):
        yield chunk(index, {"role": "assistant", "content": "", "refusal": None})
    async for index, piece in generation.pieces():
        text = "" if piece is None else piece.text
        deltas = [_delta(part) for part in parsers[index].push(text, last=piece is None)]
        called |= {index} if any("tool_calls" in delta for delta in deltas) else set()
        for delta in _scored(context, body, piece, deltas):
            yield chunk(index, *delta)
        if piece is None:
            reason = generation.answer(index).finish_reason
            reason = REASONS.get(reason, reason)
            yield chunk(index, {}, "tool_calls" if index in called and reason == "stop" else reason)
    if usage:
        count = len(generation.tickets)
        yield frame | {"choices": [], "usage": usage_of(generation.stats(), count)}


def _scored(
    context: Context, body: ChatRequest, piece: Piece | None, deltas: Sequence[dict[str, object]]
) -> list[tuple[dict[str, object], None, object]]:
    """Deltas as arguments of a chunk; the log-probabilities of a piece come with the first."""
    found = for_chat(context.vocabulary, piece) if piece is not None and body.logprobs else None
    if found is not None and not deltas:
        deltas = [{"content": ""}]
    return [(delta, None, None if i else found) for i, delta in enumerate(deltas)]


def _delta(part: Part) -> dict[str, object]:
    if isinstance(part, Text):
        return {"content": part.text}
    if isinstance(part, CallArguments):
        function = {"arguments": part.text}
        return {"tool_calls": [{"index": part.number, "function": function}]}
    return {"tool_calls": [{"index": part.number} | _call(part, "")]}


def _call(begin: CallBegin, arguments: str) -> dict[str, object]:
    function = {"name": begin.name, "arguments": arguments}
    return {"id": begin.id, "type": "function", "function": function}
