"""Serving: tokens per second, time to the first token and between tokens, by how many clients ask.

In the closed loop each client sends its next request when the last one has been answered; all
prompts differ from their first word on, so that no server reads one from memory. Peers are
`transformers serve` on torch with the same float32 weights, llama.cpp's own server on the 4-bit
file, and `lm.generate` with all prompts at once, the bound: nobody waits for anybody there, and
nothing is sent. In the open loop requests come at random times, at shares of the rate that our
server reached with the most clients. Last, requests with one long prompt in common.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from typing import Any

from bench import clients, peers
from bench.harness import Measure, Samples, interleave, ratio
from bench.options import Options
from bench.peers import servers
from bench.worker import PeerError, Worker

KEYS = (
    "tokens_per_s", "first_p50_ms", "first_p95_ms", "between_p50_ms", "between_p95_ms",
)  # fmt: skip
OURS = "jaxinfer"


def run(options: Options) -> list[tuple[dict, dict]]:
    sizes, found = options.settings("serving"), []
    with peers.Peers(options) as started, ExitStack() as stack:
        worker, facts = started.jaxinfer()
        running = {OURS: stack.enter_context(_ours(options.model, sizes))}
        running["jaxinfer int8"] = stack.enter_context(_ours(options.model, sizes, "int8"))
        for name, make in {
            "transformers": partial(_transformers, started, worker, sizes),
            "llama.cpp": partial(_llama_cpp, started, options, sizes),
        }.items():
            try:
                running[name] = stack.enter_context(make())
            except PeerError as error:
                started.left_out(name, str(error))
        for count in sizes["clients"]:
            found.append(_closed(options, sizes, worker, running, count))
        most = found[-1][1][OURS]["requests_per_s"]["median"]
        found += [_open(options, sizes, running[OURS], share, most) for share in sizes["shares"]]
        found.append(_shared(options, sizes, running[OURS]))
        for _, metrics in found:
            metrics |= {"device": facts["device"], "missing": dict(started.missing)}
            metrics["peer_facts"] = {name: _version(name) for name in running}
    return found


def _version(name: str) -> dict[str, str]:
    package = {"transformers": "transformers", "llama.cpp": "xllamacpp"}.get(name)
    return {} if package is None else {package: version(package)}


def _ours(model: str, sizes: Mapping[str, Any], weights: str | None = None):
    options = ["--slots", str(sizes["slots"]), "--context", str(sizes["context"])]
    options += [] if weights is None else ["--weights", weights]
    options += ["--queue", str(4 * max(sizes["clients"])), "--dtype", "float32"]
    name = OURS if weights is None else f"{OURS} {weights}"
    return servers.jaxinfer(model, *options, name=name, tokens=sizes["new"])


def _transformers(started: peers.Peers, worker: Worker, sizes: Mapping[str, Any]):
    if not started.options.torch:
        raise PeerError("left out with --no-torch")
    folder = started.folder / "serve"
    worker.call("export_with_tokenizer", folder=str(folder))
    return servers.transformers(str(folder), sizes["new"])


def _llama_cpp(started: peers.Peers, options: Options, sizes: Mapping[str, Any]):
    if options.gguf is None:
        raise PeerError("no --gguf file given")
    return servers.llama_cpp(
        str(started.gguf()), sizes["new"], slots=sizes["slots"], context=sizes["context"],
        threads=sizes["llama_threads"],
    )  # fmt: skip


def _closed(
    options: Options, sizes: Mapping[str, Any], worker: Worker,
    running: Mapping[str, servers.ServerProcess], count: int,
) -> tuple[dict, dict]:  # fmt: skip
    """One number of clients."""
    seeds = iter(range(options.seed, 10**9))

    def prompts() -> list[str]:  # others in every call: what was read before is not read again
        return clients.texts(count * sizes["each"], sizes["words"], next(seeds))

    def measure(server: servers.ServerProcess) -> dict[str, Any]:
        given = prompts()
        answers = clients.run(
            server.url, server.body, lambda ask: clients.closed_loop(ask, given, count)
        )
        return clients.summary(answers)

    def bound() -> dict[str, Any]:
        given, new = prompts(), sizes["new"]
        found = worker.call("batch", prompts=given, new=new, rows=count)
        return {"tokens_per_s": len(given) * new / found["seconds"]}

    measures: dict[str, Measure] = {
        name: partial(measure, server) for name, server in running.items()
    }
    measures["generate"] = bound
    say = lambda text: options.say(f"{count} clients, {text}")  # noqa: E731
    samples = interleave(measures, sizes["rounds"], say)
    metrics: dict[str, Any] = {
        name: one.summary(*(("tokens_per_s",) if name == "generate" else (*KEYS, "requests_per_s")))
        for name, one in samples.items()
    }
    metrics["ratios"] = _ratios(samples)
    config = {"loop": "closed", "clients": count} | _picked(sizes)
    return options.config(config), metrics


def _ratios(samples: Mapping[str, Samples]) -> dict[str, Any]:
    """Our rate over each peer's; llama.cpp's 4-bit weights are compared with int8."""
    pairs = {name: ("jaxinfer int8" if name == "llama.cpp" else OURS) for name in samples}
    return {
        name: ratio(samples[ours], samples[name], "tokens_per_s")
        for name, ours in pairs.items()
        if name != ours
    }


def _open(
    options: Options, sizes: Mapping[str, Any], server: servers.ServerProcess, share: float,
    most: float,
) -> tuple[dict, dict]:  # fmt: skip
    """Requests at random times."""
    options.say(f"open loop at {share:g} of {most:.2f} requests a second")
    given = clients.texts(sizes["arrivals"], sizes["words"], options.seed + round(1000 * share))
    answers = clients.run(
        server.url, server.body,
        lambda ask: clients.open_loop(ask, given, share * most, options.seed),
    )  # fmt: skip
    config = {"loop": "open", "share": share} | _picked(sizes)
    return options.config(config), {OURS: clients.summary(answers), "rate": share * most}


def _shared(
    options: Options, sizes: Mapping[str, Any], server: servers.ServerProcess
) -> tuple[dict, dict]:
    """Requests one after another behind one long prompt, and as long ones with nothing in common.
    The first of all reads the prompt for the others."""
    options.say("requests with one prompt in common")
    words, count = sizes["system_words"], sizes["behind"]
    system = clients.texts(1, words, options.seed + 1)[0]
    behind = [f"{system} {text}" for text in clients.texts(count + 1, 8, options.seed + 2)]
    apart = clients.texts(count, words + 8, options.seed + 3)

    def ask_all(prompts: list[str]) -> list[clients.Answer]:
        return clients.run(
            server.url, server.body, lambda ask: clients.closed_loop(ask, prompts, 1)
        )

    shared, alone = ask_all(behind)[1:], ask_all(apart)
    metrics: dict[str, Any] = {"shared": clients.summary(shared), "apart": clients.summary(alone)}
    metrics["sooner"] = metrics["apart"]["first_p50_ms"] / metrics["shared"]["first_p50_ms"]
    tokens = sum(answer.prompt_tokens for answer in shared)
    metrics["prompt_tokens"] = tokens / count
    metrics["read_share"] = 1 - sum(answer.cached for answer in shared) / tokens
    config = {"loop": "shared prompt", "words": words, "requests": count, "new": sizes["new"]}
    return options.config(config), metrics


def _picked(sizes: Mapping[str, Any]) -> dict[str, Any]:
    return {key: sizes[key] for key in ("slots", "context", "words", "new", "each", "rounds")}
