"""From the fields of a request to the options of `Batcher.submit`."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from jaxinfer.decode.batcher import Batcher
from jaxinfer.decode.sampling import Sampler
from jaxinfer.decode.slot_requests import Constraint
from jaxinfer.decode.ticket import Ticket
from jaxinfer.serve.context import Context
from jaxinfer.serve.errors import ApiError, refusing
from jaxinfer.serve.schema import Drawing, Sampling


@dataclass(frozen=True, kw_only=True)
class Options:
    """What all tickets of a request are asked for."""

    sampler: Sampler
    max_new_tokens: int
    seed: int
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    top_logprobs: int = 0
    prompt_log_probs: bool = False
    prefix_scope: str | None = ""

    def submit(
        self, batcher: Batcher, prompt: list[int], sample: int, constraint: Constraint | None
    ) -> Ticket:
        """Asks a batcher for one answer."""
        return batcher.submit(
            prompt,
            sampler=self.sampler,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            sample=sample,
            stop=self.stop,
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
            top_logprobs=self.top_logprobs,
            prompt_log_probs=self.prompt_log_probs,
            constraint=constraint,
            prefix_scope=self.prefix_scope,
        )


def options_of(
    context: Context, body: Drawing, owner: str, limit: int, *, top_logprobs: int = 0
) -> Options:
    """The options of a request whose answer may have `limit` tokens.

    Raises:
      ApiError: they contradict each other.
    """
    min_tokens = body.min_tokens or 0
    if min_tokens > limit:
        raise ApiError(
            400, f"min_tokens: {min_tokens} exceeds the {limit} tokens that the answer may have",
            param="min_tokens",
        )  # fmt: skip
    return Options(
        sampler=sampler_of(body, context.vocabulary.size),
        max_new_tokens=limit,
        seed=secrets.randbits(63) if body.seed is None else body.seed,
        stop=_stops(body) if isinstance(body, Sampling) else (),
        ignore_eos=bool(body.ignore_eos),
        min_tokens=min_tokens,
        top_logprobs=top_logprobs,
        prefix_scope=context.scope(owner),
    )


def sampler_of(body: Drawing, vocab: int) -> Sampler:
    """How tokens are drawn; the temperature of a request that names none is 1."""
    given: dict[str, float] = {}
    for name in ("top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
        value = getattr(body, name, None)
        if value is not None:
            given[name] = value
    bias = {}
    if isinstance(body, Sampling) and body.logit_bias:
        bias = {int(token): value for token, value in body.logit_bias.items()}
        if max(bias) >= vocab:
            raise ApiError(
                400, f"logit_bias: token {max(bias)} is beyond the vocabulary of {vocab}",
                param="logit_bias",
            )  # fmt: skip
    with refusing():
        return Sampler(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_k=max(body.top_k or 0, 0),
            logit_bias=bias,
            **given,
        )


def answer_limit(context: Context, prompts: Sequence[Sequence[int]], asked: int | None) -> int:
    """Tokens that an answer may have; `asked` for by the request or None.

    Raises:
      ApiError: the context has no room for it.
    """
    longest, room = max(map(len, prompts)), context.batcher.context
    most = min(room - longest, context.config.max_tokens or room)
    if longest >= room or (asked is not None and asked > room - longest):
        wanted = f" and an answer of {asked}" if asked else ""
        raise ApiError(
            400, f"a prompt of {longest} tokens{wanted} exceeds the context of {room}; shorten it, "
            "or ask for fewer tokens", code="context_length_exceeded",
        )  # fmt: skip
    if asked is not None and asked > most:
        raise ApiError(400, f"an answer has {most} tokens at most here, {asked} were asked for")
    return most if asked is None else asked


def _stops(body: Sampling) -> tuple[str, ...]:
    if body.stop is None:
        return ()
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
