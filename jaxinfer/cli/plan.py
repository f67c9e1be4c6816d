"""`jaxinfer plan`: which accelerators of a cluster should serve which layers of a model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jaxinfer.cli import options as o
from jaxinfer.cli.interrupts import finishing

if TYPE_CHECKING:
    from jaxinfer.config import ModelConfig

LENGTHS = "Kinds of requests as PROMPT:OUTPUT or PROMPT:OUTPUT:WEIGHT, in tokens, with commas."


@finishing()
def plan(
    cluster: Annotated[Path, typer.Argument(help="JSON or TOML file of machines and links.")],
    model: Annotated[
        Path, typer.Option("--model", "-m", help="A model's folder or its config.json.")
    ],
    rate: Annotated[float, typer.Option("--rate", help="Requests per second.")],
    deadline: Annotated[float, typer.Option("--deadline", help="Seconds for a request.")],
    lengths: Annotated[str, typer.Option("--lengths", help=LENGTHS)] = "512:128",
    policy: o.PolicyOption = "full",
    policy_args: o.PolicyArgsOption = "",
    dtype: Annotated[
        str, typer.Option("--dtype", help="Of activations and cache: float32, bfloat16, float16.")
    ] = "bfloat16",
    weight_bytes: Annotated[
        float | None, typer.Option("--weight-bytes", help="Of one weight; default: of --dtype.")
    ] = None,
    method: Annotated[
        str, typer.Option("--method", help="genetic, exhaustive (small clusters) or start.")
    ] = "genetic",
    generations: Annotated[
        int, typer.Option("--generations", min=0, max=10**6, help="Of the genetic search.")
    ] = 80,
    seconds: Annotated[
        float | None, typer.Option("--seconds", help="The search ends after so many.")
    ] = None,
    rows: Annotated[
        int, typer.Option("--rows", help="Requests whose caches every stage has room for.")
    ] = 4,
    reserve: Annotated[
        float, typer.Option("--reserve", help="GiB of every accelerator for its runtime.")
    ] = 0.5,
    start: Annotated[
        Path | None, typer.Option("--start", help="Plan to begin from, as after a loss.")
    ] = None,
    save: Annotated[Path | None, typer.Option("--save", help="Write the plan as JSON.")] = None,
    seed: o.SeedOption = 0,
    force: o.ForceOption = False,
    as_json: o.JsonOption = False,
) -> None:
    """Plan how unequal machines serve a model.

    The plan is the division of the accelerators into replicas, and of each replica into stages, of
    which most simulated requests meet their deadline. Nothing is loaded but the model's config.

    Example: jaxinfer plan cluster.json --model llama-70b --rate 2 --deadline 10 --save plan.json
    """
    from jaxinfer.files import check_new_file

    if save is not None:
        check_new_file(save, overwrite=force)
    from jaxinfer.arguments import one_of
    from jaxinfer.parallel import hexgen
    from jaxinfer.parallel.hexgen.schedule import METHODS
    from jaxinfer.progress import bars

    chosen = one_of("--method", method, METHODS)
    machines = hexgen.Cluster.load(cluster)
    load = hexgen.Workload(
        requests_per_s=rate, deadline_s=deadline, lengths=kinds_of_requests(lengths)
    )
    one_of("--dtype", dtype, ("float32", "bfloat16", "float16"))
    kept = o.make_policy(policy, policy_args)
    sizes = hexgen.ModelSizes.of(read_config(model), kept, dtype=dtype, weight_bytes=weight_bytes)
    with bars() as report:
        found = hexgen.schedule(
            machines, sizes, load, method=chosen, seed=seed, report=report,
            budget=hexgen.Budget(generations=generations, seconds=seconds),
            assumptions=hexgen.Assumptions(rows=rows, reserve_bytes=reserve * 2**30),
            start=None if start is None else hexgen.Plan.load(start),
        )  # fmt: skip
    if save is not None:
        found.save(save)
    if as_json:
        o.print_json(found.to_dict())
    else:
        print(found.explain())


def kinds_of_requests(text: str) -> tuple[tuple[int, int, float], ...]:
    """What `--lengths 512:128,64:32:0.5` means."""
    found = []
    for part in text.split(","):
        numbers = part.split(":")
        try:
            prompt, output, *weight = numbers
            found.append((int(prompt), int(output), float(weight[0]) if weight else 1.0))
            if len(weight) > 1:
                raise ValueError
        except ValueError:
            raise ValueError(
                f"--lengths expects PROMPT:OUTPUT or PROMPT:OUTPUT:WEIGHT, got {part!r}"
            ) from None
    return tuple(found)


def read_config(path: Path) -> "ModelConfig":
    """The config of a model's folder, ours or Hugging Face's, or of its config.json alone."""
    from jaxinfer.config import ModelConfig
    from jaxinfer.files import one_line, read_json
    from jaxinfer.models.registry import config_from_hf

    file = path / "config.json" if path.is_dir() else path
    data = read_json(file, 2**20)
    try:
        if data.get("format") == "jaxinfer":
            return ModelConfig.from_dict(data.get("model", {}))
        return config_from_hf(data)
    except ValueError as error:
        raise ValueError(f"{one_line(file, 1000)}: {error}") from error
