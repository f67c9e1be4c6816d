"""`jaxinfer train lte`: a model that learns to need few of its neurons."""

from pathlib import Path
from typing import Annotated, Any

import typer

from jaxinfer.cli import options as o
from jaxinfer.cli.notices import note
from jaxinfer.cli.train_options import LikeOption, SourceOption, TextsOption, sources_for

HELD_OUT_SEED = 1


def lte(
    model: Annotated[str, typer.Argument(help=f"The model to begin with: {o.MODELS}")],
    out: Annotated[Path, typer.Option(help="Folder for the artefact, or the model.")],
    run_dir: Annotated[Path, typer.Option(help="Working folder; a killed run goes on from it.")],
    preset: Annotated[
        str,
        typer.Option(help="ste; the paper's recipe: paper, or with a growing lambda ramp; to "
                     "compare with: random routers, or a dense model."),
    ] = "ste",
    eta: Annotated[
        float | None, typer.Option(help="How much few blocks are worth; sets the density.")
    ] = None,
    target_density: Annotated[
        float | None, typer.Option(help="Steers eta to this share of the blocks instead.")
    ] = None,
    separation: Annotated[
        float | None, typer.Option(help="lambda: how much clear scores are worth.")
    ] = None,
    block_size: Annotated[int, typer.Option(min=1, help="Neurons of a block.")] = 32,
    trainable: Annotated[
        str,
        typer.Option(help="What trains beside the routers: all, mlp, or adapters. all leaves a "
                     "model of its own, the others an artefact."),
    ] = "mlp",
    rank: Annotated[int, typer.Option(min=1, help="Of the adapters.")] = 8,
    windows: Annotated[int, typer.Option(min=2, help="Windows of text.")] = 4096,
    context: Annotated[int, typer.Option(min=16, max=32767, help="Tokens per window.")] = 256,
    held_out: Annotated[int, typer.Option(min=1, help="Windows to measure on.")] = 64,
    steps: Annotated[int, typer.Option(min=2, help="Updates of stage 1.")] = 1500,
    adapt_steps: Annotated[int, typer.Option(min=2, help="Updates of stage 2.")] = 1500,
    batch: Annotated[int, typer.Option(min=1, help="Windows per update.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Peak; falls to 0 as a line.")] = 1e-3,
    router_rate: Annotated[float, typer.Option(help="The routers', times that.")] = 1.0,
    texts: TextsOption = None,
    source: SourceOption = None,
    like: LikeOption = None,
    seed: o.SeedOption = 0,
    force: o.ForceOption = False,
    as_json: o.JsonOption = False,
) -> None:  # fmt: skip
    """Train a model to need few of its neurons (LTE, arXiv 2402.06126).

    Example: jaxinfer train lte tiny-llama --target-density 0.25 --out lte --run-dir run
    """
    from jaxinfer.cli.models import open_model
    from jaxinfer.progress import bars
    from jaxinfer.train.lte.recipe import preset as recipe_of
    from jaxinfer.train.lte.saving import check_out, save_trained
    from jaxinfer.train.lte.student import check_model
    from jaxinfer.train.lte.training import train_lte
    from jaxinfer.train.windows import text_windows

    recipe = recipe_of(
        preset, eta=eta, target_density=target_density, separation=separation,
        block_size=block_size, trainable=trainable, rank=rank, steps=steps,
        adapt_steps=adapt_steps, batch=batch, learning_rate=learning_rate,
        router_rate=router_rate, seed=seed,
    )  # fmt: skip
    check_out(out, recipe, overwrite=force)  # before hours of work
    lm = open_model(model, "float32")
    check_model(lm.config, lm.params, recipe)
    sources = sources_for(lm, source, like, texts)
    tokens = text_windows(lm.encode, windows, context, seed=seed, sources=sources, folder=texts)
    others = text_windows(
        lm.encode, held_out, context, seed=HELD_OUT_SEED, sources=sources, folder=texts,
        split="heldout",
    )  # fmt: skip
    note(f"{tokens.size} tokens in {windows} windows; {others.size} to measure on")
    with bars(transient=False) as report:
        trained = train_lte(lm, tokens, others, recipe, run_dir, report=report)
    record = {"preset": preset, "windows": windows, "context": context, "held_out": held_out}
    results = save_trained(out, lm, trained, others, record=record, overwrite=force)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    if as_json:
        o.print_json({"folder": str(out), "bytes": size, "results": results})
        return
    print(f"wrote {out} ({size / 1e6:.1f} MB)")
    for name, what in _STAGES.items():
        print(f"{what}: {_found(results[name])}")


_STAGES = {
    "dense": "the model before",
    "before": "before stage 2",
    "after": "after stage 2",
    "stored": "as it is stored",
}


def _found(row: dict[str, Any]) -> str:
    text = f"held-out perplexity {row['perplexity']:.3f}"
    if "density" not in row:
        return f"{text}, dense"
    layers = ", ".join(f"{share:.2f}" for share in row["densities"])
    return f"{text}, density {row['density']:.3f} ({layers}), {row['gflops']:.4g} GFLOPs a token"
