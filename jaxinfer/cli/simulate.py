"""`jaxinfer simulate`: requests replayed on a plan."""

from pathlib import Path
from typing import Annotated

import typer

from jaxinfer.cli import options as o
from jaxinfer.files import quoted
from jaxinfer.typing import Json


def simulate(
    plan: Annotated[Path, typer.Argument(help="Plan of `jaxinfer plan --save`.")],
    trace: Annotated[
        Path | None,
        typer.Option("--trace", help="CSV of TIMESTAMP,ContextTokens,GeneratedTokens."),
    ] = None,
    rate: Annotated[
        float | None, typer.Option("--rate", help="Requests per second; default: the plan's.")
    ] = None,
    requests: Annotated[
        int, typer.Option("--requests", min=1, max=10**6, help="Without a trace: so many.")
    ] = 2000,
    deadline: Annotated[
        float | None, typer.Option("--deadline", help="Seconds; default: the plan's.")
    ] = None,
    unit: Annotated[
        str,
        typer.Option(
            "--unit", help="requests (whole, no batching) or tokens (continuous batching)."
        ),
    ] = "requests",
    router: Annotated[
        str,
        typer.Option("--router", help="least_finish, round_robin, shortest_queue or power_of_two."),
    ] = "least_finish",
    losses: Annotated[
        list[str],
        typer.Option("--lose", metavar="SECONDS:MACHINE", help="A machine is lost; repeatable."),
    ] = [],  # noqa: B006 (typer copies it)
    seed: o.SeedOption = 0,
    as_json: o.JsonOption = False,
) -> None:
    """Replay requests on a plan.

    Without a trace they are the plan's workload: Poisson arrivals of its kinds of requests.

    Example: jaxinfer simulate plan.json --rate 4 --unit tokens
    """
    import dataclasses

    from jaxinfer.arguments import one_of
    from jaxinfer.parallel import hexgen
    from jaxinfer.parallel.hexgen.routing import POLICIES
    from jaxinfer.parallel.hexgen.simulate import UNITS

    if trace is not None and rate is not None:
        raise ValueError("--rate and --trace cannot be combined; a trace has its own times")
    known, policy = one_of("--unit", unit, UNITS), one_of("--router", router, POLICIES)
    found = hexgen.Plan.load(plan)
    load = found.workload
    if rate is not None:
        load = dataclasses.replace(load, requests_per_s=rate)
    if deadline is not None:
        load = dataclasses.replace(load, deadline_s=deadline)
    replayed = load.trace(requests, seed) if trace is None else hexgen.Trace.load(trace)
    outcome = hexgen.simulate(
        found, replayed, unit=known, router=policy, losses=[_loss(x) for x in losses], seed=seed
    )
    record = outcome.to_dict(load.deadline_s)
    if as_json:
        o.print_json(record)
    else:
        _show(record)


def _loss(text: str) -> tuple[float, str]:
    time, colon, machine = text.partition(":")
    try:
        if not colon:
            raise ValueError
        return float(time), machine
    except ValueError:
        raise ValueError(f"--lose expects SECONDS:MACHINE, got {quoted(text)}") from None


def _show(record: Json) -> None:
    from rich.console import Console
    from rich.table import Table

    out = Table("seconds", "mean", "50 %", "90 %", "99 %", title_justify="left")
    for name in ("latency_s", "time_to_first_token_s", "time_per_token_s"):
        if name in record:
            cells = [record[name].get(p) for p in ("mean", "50", "90", "99")]
            texts = ["never" if x is None else f"{x:.4g}" for x in cells]
            out.add_row(name.removesuffix("_s").replace("_", " "), *texts)
    console = Console()
    console.print(out)
    console.print(
        f"{record['attainment']:.1%} of {record['requests']} requests within "
        f"{record['deadline_s']:g} s; {record['retried']} began again, {record['lost']} lost"
    )
