"""`jaxinfer chaos`: stages of a model are killed while they serve it."""

from typing import Annotated

import typer

from jaxinfer.cli import options as o

BEGINNINGS = ("Once upon a time", "The king", "It was", "She said that", "In the year of", "A")


def chaos(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help=o.DEFAULT_MODEL)] = None,
    stages: Annotated[
        int, typer.Option("--stages", min=1, max=64, help="Processes, with layers alike.")
    ] = 3,
    requests: Annotated[
        int, typer.Option("--requests", min=1, max=1000, help="That run and wait at a time.")
    ] = 16,
    kills: Annotated[int, typer.Option("--kills", min=1, max=10**4, help="So many.")] = 20,
    slots: Annotated[int, typer.Option("--slots", min=1, help="Requests that run at once.")] = 8,
    new: Annotated[
        int, typer.Option("--max-new-tokens", min=1, max=4096, help="Of each answer.")
    ] = 32,
    policy: o.PolicyOption = "full",
    policy_args: o.PolicyArgsOption = "",
    dtype: o.DtypeOption = None,
    seed: o.SeedOption = 0,
    as_json: o.JsonOption = False,
) -> None:
    """Kill the stages of a served model, and compare its texts.

    A model is served by processes, each with some of its layers. The same texts are asked for again
    and again, while processes are killed at random: in prompts, in steps, while they start again,
    two at once. Nothing may be lost, doubled or changed; else the exit code is 1.

    Example: jaxinfer chaos tiny-llama --kills 5
    """
    from jaxinfer.decode.batcher import Batcher
    from jaxinfer.io.load import load_checkpoint
    from jaxinfer.io.model_index import DEFAULT
    from jaxinfer.parallel.chaos import drill
    from jaxinfer.parallel.pipeline import Pipeline, StageShape
    from jaxinfer.progress import bars

    source = DEFAULT if model is None else model
    layers = load_checkpoint(source, dtype, layers=range(0)).config.num_layers
    if stages > layers:
        raise ValueError(f"--stages {stages} exceed the {layers} layers of the model; take fewer")
    cuts = [layers * i // stages for i in range(stages + 1)]
    shapes = [StageShape(range(*pair)) for pair in zip(cuts, cuts[1:], strict=False)]
    kept = {**o.key_values(policy_args, "--policy-args"), "name": policy}
    pipeline = Pipeline(source, shapes, policy=kept, slots=slots, context=new + 32, dtype=dtype)
    prompts = [BEGINNINGS[i % len(BEGINNINGS)] for i in range(requests)]
    with Batcher(pipeline, queue=requests) as batcher, bars() as report:
        found = drill(
            batcher, pipeline, prompts, kills=kills, new_tokens=new, seed=seed, report=report
        )
    facts = found.to_dict()
    if as_json:
        o.print_json(facts)
    else:
        print(
            f"{found.kills} kills, {found.requests} requests: {found.lost} lost, "
            f"{found.different} different; recovery {facts['recovery_median_s'] or 0:.1f} s in the "
            "median"
        )
    if not found.passed:
        raise typer.Exit(1)
