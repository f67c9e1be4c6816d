"""`jaxinfer serve`: the OpenAI API on this machine."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypedDict

import typer

from jaxinfer.cli import options as o
from jaxinfer.cli.decoding import Decoding
from jaxinfer.cli.interrupts import answered_elsewhere, leave
from jaxinfer.cli.notices import note, work_begins
from jaxinfer.files import quoted, read_text

if TYPE_CHECKING:
    from jaxinfer.cache.policy import Policy
    from jaxinfer.decode.batcher import Batcher
    from jaxinfer.serve import ServeConfig

SIGNALLED = 128  # and the number of the signal, as a shell writes it
KEYS_BYTES = 2**20
BACKLOG = 2048  # connections that wait to be taken


class Sizes(TypedDict):
    """Of a batcher."""

    slots: int
    context: int
    queue: int
    prefix_bytes: int


def serve(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help=o.DEFAULT_MODEL)] = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to serve at; 0.0.0.0 is every one.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")
    ] = 8000,
    slots: Annotated[
        int, typer.Option("--slots", min=1, help="Requests that run at once, a power of two.")
    ] = 8,
    context: Annotated[
        int, typer.Option("--context", min=2, help="Tokens of a request, prompt and answer.")
    ] = 2048,
    queue: Annotated[int, typer.Option("--queue", min=0, help="Requests that wait at most.")] = 64,
    policy: o.PolicyOption = "full",
    policy_args: o.PolicyArgsOption = "",
    draft: o.DraftOption = None,
    tree: o.TreeOption = None,
    weights: o.WeightsOption = None,
    dtype: o.DtypeOption = None,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", min=1, help="Most tokens of an answer; default: context."),
    ] = None,
    timeout: Annotated[
        float, typer.Option("--timeout", help="Seconds that an answer may take.")
    ] = 600.0,
    api_key_file: Annotated[
        Path | None,
        typer.Option("--api-key-file", help="A file with one key a line; requests need one."),
    ] = None,
    cors_origin: Annotated[
        list[str],
        typer.Option("--cors-origin", help="A web page that may use the server; repeatable."),
    ] = [],  # noqa: B006 (typer copies it)
    served_name: Annotated[
        str | None, typer.Option("--served-name", help="The model's name in requests.")
    ] = None,
    drain_s: Annotated[
        float, typer.Option("--drain-s", help="Seconds for running requests at the end.")
    ] = 30.0,
    prefix_cache: Annotated[
        str | None,
        typer.Option(
            "--prefix-cache",
            help="Who shares what was read of prompts that begin alike: key (those of one API "
            "key), shared (all) or off. Left out: key, where the policy can.",
        ),
    ] = None,
    prefix_mib: Annotated[
        int, typer.Option("--prefix-mib", min=1, help="Memory for that, in MiB.")
    ] = 256,
    plan: Annotated[
        Path | None,
        typer.Option("--plan", help="Serve in the stages of a plan of `jaxinfer plan --save`."),
    ] = None,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="Log JSON lines instead of text.")
    ] = False,
) -> None:
    """Serve the OpenAI API on this machine.

    Requests run together (continuous batching). Ctrl-C or SIGTERM lets those that run end, a second
    one gives them up. With --plan the stages of its only replica are processes of this machine.

    Example: jaxinfer serve smollm2-135m --weights int8 --port 8000
    """
    from jaxinfer.serve import ServeConfig, check_packages

    check_packages()
    kept = o.make_policy(policy, policy_args)
    config = ServeConfig(
        name=served_name,
        api_keys=_keys(api_key_file),
        max_tokens=max_tokens,
        timeout_s=timeout,
        cors_origins=tuple(cors_origin),
        prefixes=_scope(prefix_cache, kept) if plan is None else "off",
        drain_s=drain_s,
        log="json" if log_json else "text",
    )
    decoding = Decoding(model=model, dtype=dtype, weights=weights, draft=draft, tree=tree)
    sizes: Sizes = {
        "slots": slots,
        "context": context,
        "queue": queue,
        "prefix_bytes": 0 if config.prefixes == "off" else prefix_mib * 2**20,
    }
    if plan is None:
        start = functools.partial(_here, decoding, kept, sizes)
    else:
        _check_with_plan(draft, weights, prefix_cache)
        named = {**o.key_values(policy_args, "--policy-args"), "name": policy}
        start = functools.partial(_in_stages, plan, decoding, named, sizes)
    code = _run(start, config, host, port)
    if code:
        raise typer.Exit(code)


def _here(decoding: Decoding, policy: "Policy", sizes: Sizes) -> "Batcher":
    """The model in this process."""
    lm = decoding.open()
    return lm.batcher(policy=policy, draft=decoding.speculator(lm), **sizes)


def _in_stages(
    file: Path, decoding: Decoding, policy: "dict[str, object]", sizes: Sizes
) -> "Batcher":
    """The model in the stages of a plan."""
    from jaxinfer.io.model_index import DEFAULT
    from jaxinfer.parallel import hexgen

    plan = hexgen.Plan.load(file)
    if len(plan.replicas) > 1:
        raise ValueError(
            f"{quoted(str(file))} has {len(plan.replicas)} replicas, and one is served by a "
            "command; give each a plan of its own, or use ji.hexgen.serve(plan, ..., replica=)"
        )
    own = {name: value for name, value in sizes.items() if name != "prefix_bytes"}
    source = DEFAULT if decoding.model is None else decoding.model
    return hexgen.serve(plan, source, policy=policy, dtype=decoding.dtype, **own)  # type: ignore


def _check_with_plan(draft: str | None, weights: str | None, prefix_cache: str | None) -> None:
    """Refuses options that stages do not have."""
    given = {"--draft": draft, "--weights": weights, "--prefix-cache": prefix_cache}
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name} is for one process; leave it out, or leave --plan out")


def _run(start: "Callable[[], Batcher]", config: "ServeConfig", host: str, port: int) -> int:
    """Serves until a signal comes; the exit code."""
    from jaxinfer.serve import create_app
    from jaxinfer.serve.server import Server, bound

    with bound(host, port) as listener, start() as batcher:
        server = Server(create_app(batcher, config))
        listener.listen(BACKLOG)
        work_begins()
        name = f"[{host}]" if ":" in host else host
        url = f"http://{name}:{listener.getsockname()[1]}/v1"
        sizes = f"{batcher.slots} slots of {batcher.context} tokens"
        note(f"serving {batcher.model.name}: {url} ({sizes})")
        with answered_elsewhere():
            server.run([listener])
        code = 0 if server.aborted is None else SIGNALLED + server.aborted
        if server.busy:  # a compilation or a step, which nothing can stop
            leave(code)
        batcher.close(cancel=True)
    return code


def _scope(given: str | None, policy: "Policy") -> str:
    if given is not None:
        return given
    return "key" if policy.chunk_invariant else "off"


def _keys(path: Path | None) -> tuple[str, ...]:
    """The keys of a file: one a line; blank lines and those that begin with # are none."""
    if path is None:
        return ()
    lines = [line.strip() for line in read_text(path, KEYS_BYTES).splitlines()]
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ValueError(f"{quoted(str(path))} holds no key; write one a line")
    if any(not key.isascii() or not key.isprintable() or " " in key for key in keys):
        raise ValueError(f"{quoted(str(path))}: a key is one word of ASCII characters")
    return keys
