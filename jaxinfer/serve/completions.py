"""`POST /v1/completions`: the continuation of texts or tokens."""

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from jaxinfer.decode.ticket import Answer, RequestStats
from jaxinfer.serve.context import Context
from jaxinfer.serve.errors import ApiError, Json, refusing
from jaxinfer.serve.generation import REASONS, Generation, usage_of
from jaxinfer.serve.grammar import grammar_of
from jaxinfer.serve.logprobs import TextLogProbs
from jaxinfer.serve.options import Options, answer_limit, options_of
from jaxinfer.serve.schema import CompletionRequest
from jaxinfer.serve.stream import Events

USUAL_TOKENS = 16
"""What the API gives a request that names no `max_tokens`."""


async def complete(
    context: Context, request: Request, body: CompletionRequest, owner: str
) -> Response:
    """Answers a request."""
    asked = _Asked(context, body)
    prompts, opts = await run_in_threadpool(asked.prepared, owner)
    grammar = await run_in_threadpool(grammar_of, context.vocabulary, body)
    generation = await Generation.start(
        context, prompts, opts, asked.best_of, None if grammar is None else grammar.follow
    )
    if body.stream:
        return Events(context, generation, asked.chunks(generation))
    return Json(asked.whole(await generation.answers(request)))


class _Asked:
    """One request, and the JSON that answers it."""

    def __init__(self, context: Context, body: CompletionRequest):
        self.context, self.body = context, body
        self.n = body.n or 1
        self.best_of = self.n if body.best_of is None else body.best_of
        self.prompts: list[list[int]] = []
        self._check()

    def _check(self) -> None:
        body = self.body
        if self.best_of < self.n:
            raise ApiError(400, f"best_of: {self.best_of} is below n = {self.n}", param="best_of")
        if self.best_of > self.n and body.stream:
            raise ApiError(400, "best_of cannot be streamed; leave out stream", param="best_of")
        if body.stream_options is not None and not body.stream:
            raise ApiError(400, "stream_options need stream", param="stream_options")
        if body.max_tokens == 0 and not body.echo:
            raise ApiError(400, "max_tokens: 0 needs echo", param="max_tokens")
        if body.echo and body.logprobs:
            raise ApiError(
                400, "logprobs with echo must be 0: the likeliest tokens of a prompt are not kept",
                param="logprobs",
            )  # fmt: skip

    def prepared(self, owner: str) -> tuple[list[list[int]], Options]:
        """The tokens of the prompts, and the options."""
        context, body = self.context, self.body
        with refusing(param="prompt"):
            self.prompts = [context.batcher.model.encode(one) for one in self._given()]
        asked = body.max_tokens
        limit = answer_limit(context, self.prompts, asked or None)
        limit = min(limit, USUAL_TOKENS) if asked is None else max(asked, 1)
        opts = options_of(context, body, owner, limit, top_logprobs=body.logprobs or 0)
        scored = bool(body.echo) and body.logprobs is not None
        return self.prompts, replace(opts, prompt_log_probs=scored)

    def _given(self) -> Sequence[str | Sequence[int]]:
        prompt = self.body.prompt
        if isinstance(prompt, str):
            return [prompt]
        texts = [one for one in prompt if not isinstance(one, int)]
        return texts or [[one for one in prompt if isinstance(one, int)]]

    def whole(self, answers: Sequence[Answer]) -> dict[str, object]:
        """The response."""
        best = []
        for first in range(0, len(answers), self.best_of):
            samples = sorted(answers[first : first + self.best_of], key=_likely, reverse=True)
            best += samples[: self.n] if self.best_of > self.n else answers[first:][: self.n]
        choices = [self._choice(index, answer) for index, answer in enumerate(best)]
        usage = self._usage([answer.stats for answer in answers])
        return self._frame(_identifier(), int(time.time())) | {"choices": choices, "usage": usage}

    def _usage(self, stats: Sequence[RequestStats]) -> dict[str, object]:
        usage = usage_of(stats, self.best_of)
        if self.body.max_tokens == 0:  # the batcher has made a token that nobody gets
            usage |= {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
        return usage

    def _choice(self, index: int, answer: Answer) -> dict[str, object]:
        log_probs = TextLogProbs(self.context.vocabulary, self.body.logprobs or 0)
        text, found = self._echo(index, answer.prompt_log_probs, log_probs)
        if self.body.max_tokens != 0:
            text += answer.text
            found = _joined(found, log_probs.piece(answer))
        reason = "length" if self.body.max_tokens == 0 else answer.finish_reason
        return {
            "index": index,
            "text": text,
            "logprobs": None if self.body.logprobs is None else found,
            "finish_reason": REASONS.get(reason, reason),
        }

    def _echo(
        self, index: int, prompt_log_probs: list[float] | None, log_probs: TextLogProbs
    ) -> tuple[str, dict[str, object] | None]:
        """The prompt of a choice, where it is to be repeated."""
        if not self.body.echo:
            return "", None
        number = index // self.n
        prompt, tokens = self._given()[number], self.prompts[number]
        decode = self.context.vocabulary.tokenizer.decode
        text = prompt if isinstance(prompt, str) else decode(tokens)
        if prompt_log_probs is None:
            return text, None
        return text, log_probs.prompt(tokens, prompt_log_probs)

    async def chunks(self, generation: Generation) -> AsyncIterator[dict[str, object]]:
        """The events of a stream."""
        body, frame = self.body, self._frame(_identifier(), int(time.time()))
        usage = body.stream_options is not None and body.stream_options.include_usage
        frame |= {"usage": None} if usage else {}
        log_probs = [
            TextLogProbs(self.context.vocabulary, body.logprobs or 0) for _ in generation.tickets
        ]
        begun: set[int] = set()

        def chunk(index: int, text: str, found: object, reason: str | None) -> dict[str, object]:
            found = None if body.logprobs is None else found
            choice = {"index": index, "text": text, "logprobs": found, "finish_reason": reason}
            return frame | {"choices": [choice]}

        async for index, piece in generation.pieces():
            if index not in begun:
                begun.add(index)
                completion = generation.tickets[index].completion
                scores = None if completion is None else completion.prompt_log_probs
                text, found = self._echo(index, scores, log_probs[index])
                if text:
                    yield chunk(index, text, found, None)
            if piece is None:
                reason = generation.answer(index).finish_reason
                reason = "length" if body.max_tokens == 0 else REASONS.get(reason, reason)
                yield chunk(index, "", None, reason)
            elif body.max_tokens != 0:
                yield chunk(index, piece.text, log_probs[index].piece(piece), None)
        if usage:
            yield frame | {"choices": [], "usage": self._usage(generation.stats())}

    def _frame(self, identifier: str, created: int) -> dict[str, object]:
        return {
            "id": identifier,
            "object": "text_completion",
            "created": created,
            "model": self.context.name,
            "system_fingerprint": self.context.fingerprint,
        }


def _identifier() -> str:
    return f"cmpl-{uuid.uuid4().hex}"


def _likely(answer: Answer) -> float:
    """The log-probability of an answer, per token."""
    return sum(answer.log_probs) / max(len(answer.log_probs), 1)


def _joined(one: dict[str, object] | None, other: dict[str, object]) -> dict[str, object]:
    """Log-probabilities of a prompt and of what follows it."""
    if one is None:
        return other
    found = {}
    for name, value in other.items():
        both = (one[name], value)
        lists = [x for x in both if isinstance(x, list)]
        found[name] = sum(lists, []) if len(lists) == 2 else None
    return found
