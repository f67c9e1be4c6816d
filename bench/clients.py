"""Clients of a server with the OpenAI API, and what each of their requests saw.

All of them live in one event loop of this process, which does nothing else while they run. Times
are seconds of `time.perf_counter`. A server may send several tokens in one piece, so "between" is
the time between pieces: what a reader waits for.
"""

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

TIMEOUT_S = 300.0
README = Path(__file__).parents[1] / "README.md"


@dataclass
class Answer:
    """One request: its status, when it was sent and ended, and when text arrived."""

    status: int
    sent: float
    ended: float = 0.0
    pieces: list[float] = field(default_factory=list)
    text: str = ""
    tokens: int = 0
    prompt_tokens: int = 0
    cached: int = 0  # of these, that were not read again

    @property
    def first_s(self) -> float:
        """From sending to the first text."""
        return (self.pieces[0] if self.pieces else self.ended) - self.sent

    @property
    def between(self) -> list[float]:
        return np.diff(self.pieces).tolist()


Ask = Callable[[str], Coroutine[Any, Any, Answer]]


def texts(count: int, words: int, seed: int) -> list[str]:
    """Prompts of random words of the README, all different from the first word on."""
    known = sorted(set(re.findall(r"[a-z]{3,}", README.read_text(encoding="utf-8"))))
    rng = np.random.default_rng(seed)
    first = rng.permutation(len(known))[:count]
    if len(first) < count:
        raise ValueError(f"{count} prompts need as many different words, there are {len(known)}")
    others = rng.integers(0, len(known), (count, words - 1))
    return [
        " ".join(known[i] for i in (start, *rest))
        for start, rest in zip(first, others.tolist(), strict=True)
    ]


def asker(client: httpx.AsyncClient, url: str, body: Mapping[str, Any]) -> Ask:
    """A function that sends one prompt for a streamed completion, and waits for its end."""

    async def ask(prompt: str) -> Answer:
        sent = time.perf_counter()
        request = dict(body) | {"prompt": prompt, "stream": True}
        async with client.stream("POST", f"{url}/completions", json=request) as reply:
            answer = Answer(reply.status_code, sent)
            async for line in reply.aiter_lines():
                _add(answer, line)
        answer.ended = time.perf_counter()
        answer.tokens = answer.tokens or len(answer.pieces)
        return answer

    return ask


def _add(answer: Answer, line: str) -> None:
    """Takes one line of server-sent events into account."""
    if not line.startswith("data: {"):
        return
    event = json.loads(line.removeprefix("data: "))
    text = "".join(choice.get("text") or "" for choice in event.get("choices", []))
    if text:
        answer.pieces.append(time.perf_counter())
        answer.text += text
    if usage := event.get("usage"):
        answer.tokens, answer.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
        answer.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


async def closed_loop(ask: Ask, prompts: Sequence[str], clients: int) -> list[Answer]:
    """The prompts by so many clients, each of which sends one when its last has been answered."""
    waiting, found = iter(prompts), []

    async def one() -> None:
        for prompt in waiting:
            found.append(await ask(prompt))

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(one())
    return found


async def open_loop(ask: Ask, prompts: Sequence[str], rate: float, seed: int) -> list[Answer]:
    """The prompts at random times, `rate` a second on average, however long answers take."""
    waits = np.random.default_rng(seed).exponential(1 / rate, len(prompts))
    async with asyncio.TaskGroup() as group:
        tasks = []
        for prompt, wait in zip(prompts, waits, strict=True):
            await asyncio.sleep(wait)
            tasks.append(group.create_task(ask(prompt)))
    return [task.result() for task in tasks]


def run(url: str, body: Mapping[str, Any], job: Callable[[Ask], Awaitable[Any]]) -> Any:
    """What `job` returns, given a function that asks the server at `url`."""

    async def all_of_it() -> Any:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(timeout=TIMEOUT_S, limits=limits) as client:
            return await job(asker(client, url, body))

    return asyncio.run(all_of_it())


def summary(answers: Sequence[Answer]) -> dict[str, Any]:
    """Tokens per second from the first request to the last answer; milliseconds to the first piece
    and between pieces, at the median and at the 95th percentile.

    Raises:
      ValueError: a request was refused.
    """
    wrong = [answer.status for answer in answers if answer.status != 200]
    if wrong:
        raise ValueError(f"{len(wrong)} of {len(answers)} requests failed, one with {wrong[0]}")
    seconds = max(a.ended for a in answers) - min(a.sent for a in answers)
    found = {
        "seconds": seconds,
        "tokens_per_s": sum(a.tokens for a in answers) / seconds,
        "requests_per_s": len(answers) / seconds,
    }
    between = [gap for answer in answers for gap in answer.between] or [0.0]
    for name, values in (("first", [a.first_s for a in answers]), ("between", between)):
        for percent in (50, 95):
            found[f"{name}_p{percent}_ms"] = 1e3 * float(np.percentile(values, percent))
    return found
