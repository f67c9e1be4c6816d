"""A server under more load than it can take, with clients that go or read slowly, and at its end.

    python -m bench.load --model tiny-llama

Everything is on this machine's loopback and bounded. Each check starts or shares a server of its
own process, prints what it saw, and says whether that is what a client may expect.
"""

import asyncio
import json
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import httpx
import numpy as np
import typer

from bench.clients import texts
from bench.peers.servers import ServerProcess, jaxinfer, memory

SLOTS, QUEUE, CONTEXT = 8, 16, 256
WAIT_S = 60.0
Job = Callable[[httpx.AsyncClient], Awaitable[dict[str, Any]]]


def main(
    model: Annotated[str, typer.Option(help="Model name or folder.")] = "tiny-llama",
    clients: Annotated[int, typer.Option(min=32, help="That ask at once.")] = 64,
    disconnects: Annotated[int, typer.Option(min=1, help="Clients that go away.")] = 200,
    seed: Annotated[int, typer.Option(help="Of prompts and of times.")] = 0,
) -> None:
    """Runs every check; exit code 1 if one fails."""
    failed = []
    for name, found in checks(model, clients, disconnects, seed):
        print(json.dumps({"check": name} | found), flush=True)
        if not found["passed"]:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
        raise typer.Exit(1)


def checks(model: str, clients: int, disconnects: int, seed: int):
    """(name, what was seen) of every check."""
    with server(model) as running:
        yield "surplus", run(running, lambda client: surplus(client, running, clients, seed))
        yield "disconnects", run(running, lambda client: gone(client, running, disconnects, seed))
        yield "slow reader", run(running, lambda client: slow_reader(client, running, seed))
        yield "drain", run(running, lambda client: drain(client, running, seed))
    yield "kill and restart", killed(model)


def server(model: str):
    return jaxinfer(
        model, "--slots", str(SLOTS), "--queue", str(QUEUE), "--context", str(CONTEXT)
    )  # fmt: skip


def run(running: ServerProcess, job: Job) -> dict[str, Any]:
    async def all_of_it() -> dict[str, Any]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(timeout=WAIT_S, limits=limits) as client:
            return await job(client)

    return asyncio.run(all_of_it())


async def surplus(
    client: httpx.AsyncClient, running: ServerProcess, clients: int, seed: int
) -> dict[str, Any]:
    """More clients than slots and queue hold: those admitted are answered, the others are told at
    once to come again."""

    async def one(prompt: str) -> tuple[int, float]:
        sent = time.perf_counter()
        reply = await client.post(_url(running), json=_body(running, prompt, 96))
        return reply.status_code, time.perf_counter() - sent

    prompts = texts(clients, 8, seed)
    found = await asyncio.gather(*(one(prompt) for prompt in prompts))
    refused = [seconds for status, seconds in found if status == 429]
    answered = sum(status == 200 for status, _ in found)
    slowest = 1e3 * max(refused, default=0.0)
    return {
        "clients": clients, "answered": answered, "refused": len(refused),
        "slowest_refusal_ms": slowest,
        "passed": answered + len(refused) == clients and answered >= SLOTS + QUEUE
        and slowest < 100 and await _settled(client, running),
    }  # fmt: skip


async def gone(
    client: httpx.AsyncClient, running: ServerProcess, count: int, seed: int
) -> dict[str, Any]:
    """Clients that go away at random moments leave no slot taken."""
    waits = np.random.default_rng(seed).uniform(0.0, 0.4, count)
    statuses: list[int] = []

    async def one(prompt: str, wait: float) -> None:
        body = _body(running, prompt, CONTEXT // 2) | {"stream": True}
        try:
            async with asyncio.timeout(wait):
                async with client.stream("POST", _url(running), json=body) as reply:
                    statuses.append(reply.status_code)
                    async for _ in reply.aiter_lines():
                        pass
        except TimeoutError:
            pass

    prompts = texts(count, 4, seed)
    for first in range(0, count, SLOTS):
        pairs = zip(prompts[first : first + SLOTS], waits[first : first + SLOTS], strict=True)
        await asyncio.gather(*(one(prompt, wait) for prompt, wait in pairs))
    free = await _settled(client, running)
    reply = await client.post(_url(running), json=_body(running, "Once", 4))
    passed = free and reply.status_code == 200 and all(x in (200, 429) for x in statuses)
    return {"clients": count, "begun": len(statuses), "all_slots_free": free, "passed": passed}


async def slow_reader(
    client: httpx.AsyncClient, running: ServerProcess, seed: int
) -> dict[str, Any]:
    """One that reads no further does not keep others waiting."""
    given = texts(3, 8, seed)
    body = _body(running, given[0], CONTEXT // 2) | {"stream": True, "logprobs": 5}
    before = await _seconds(client, running, given[1])
    async with client.stream("POST", _url(running), json=body) as slow:
        lines = slow.aiter_lines()
        await anext(lines)
        during = await _seconds(client, running, given[2])
        rest = [line async for line in lines if line]
    return {
        "alone_s": before, "beside_s": during,
        "passed": during < 3 * before + 0.5 and rest[-1] == "data: [DONE]",
    }  # fmt: skip


async def drain(client: httpx.AsyncClient, running: ServerProcess, seed: int) -> dict[str, Any]:
    """SIGTERM: what runs ends whole, what is new is refused, the process ends with 0."""

    async def one(prompt: str) -> tuple[int, int]:
        body = _body(running, prompt, CONTEXT // 2)
        reply = await client.post(_url(running), json=body)
        usage = reply.json().get("usage") or {}
        return reply.status_code, usage.get("completion_tokens", 0)

    tasks = [asyncio.create_task(one(prompt)) for prompt in texts(SLOTS, 8, seed)]
    while await _metric(client, running, "running_requests") < SLOTS:
        await asyncio.sleep(0.005)
    running.process.send_signal(signal.SIGTERM)
    refused = 0
    while not all(task.done() for task in tasks):
        try:
            reply = await client.post(_url(running), json=_body(running, "Once", 2))
        except httpx.TransportError:
            break
        refused += reply.status_code == 503
        await asyncio.sleep(0.02)
    answers = [await task for task in tasks]
    status = await asyncio.to_thread(running.process.wait, WAIT_S)
    whole = sum(answer == (200, CONTEXT // 2) for answer in answers)
    passed = whole == SLOTS and refused > 0 and status == 0
    return {"in_flight": SLOTS, "whole": whole, "refused": refused, "exit": status,
            "passed": passed}  # fmt: skip


def killed(model: str) -> dict[str, Any]:
    """SIGKILL while it answers, and a start again: the first token is there soon, as programs were
    kept, and the dead process left nothing that is in the way."""
    with server(model) as running:
        resident = memory(running.process)
        body = _body(running, "Once", CONTEXT // 2) | {"stream": True}
        with httpx.stream("POST", _url(running), json=body, timeout=WAIT_S) as reply:
            next(reply.iter_lines())
            running.process.kill()
        running.process.wait()
    start = time.perf_counter()
    with server(model):  # which is ready when it has answered
        seconds = time.perf_counter() - start
    return {"first_answer_s": seconds, "resident_mb": resident / 1e6, "passed": seconds < 10}


async def _seconds(client: httpx.AsyncClient, running: ServerProcess, prompt: str) -> float:
    start = time.perf_counter()
    reply = await client.post(_url(running), json=_body(running, prompt, 16))
    reply.raise_for_status()
    return time.perf_counter() - start


async def _settled(client: httpx.AsyncClient, running: ServerProcess) -> bool:
    """Whether all slots become free again."""
    stop = time.monotonic() + WAIT_S
    while time.monotonic() < stop:
        if not await _metric(client, running, "running_requests"):
            return not await _metric(client, running, "waiting_requests")
        await asyncio.sleep(0.05)
    return False


async def _metric(client: httpx.AsyncClient, running: ServerProcess, name: str) -> float:
    text = (await client.get(running.url.removesuffix("/v1") + "/metrics")).text
    lines = [line for line in text.splitlines() if line.startswith(f"jaxinfer_{name} ")]
    return float(lines[0].split()[1])


def _url(running: ServerProcess) -> str:
    return f"{running.url}/completions"


def _body(running: ServerProcess, prompt: str, tokens: int) -> dict[str, Any]:
    body = {key: value for key, value in running.body.items() if key != "stream_options"}
    return body | {"prompt": prompt, "max_tokens": tokens}


if __name__ == "__main__":
    typer.run(main)
