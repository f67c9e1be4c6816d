"""`jaxinfer train dejavu`: predictors of what a token will need."""

from pathlib import Path
from typing import Annotated, Any

import typer

from jaxinfer.cli import options as o
from jaxinfer.cli.notices import note
from jaxinfer.cli.train_options import LikeOption, SourceOption, TextsOption, sources_for


def dejavu(
    model: Annotated[str, typer.Argument(help=f"The frozen model: {o.MODELS}")],
    out: Annotated[Path, typer.Option(help="Folder for the predictors.")],
    run_dir: Annotated[Path, typer.Option(help="Working folder; a killed run goes on from it.")],
    sequences: Annotated[int, typer.Option(min=2, help="Windows of text.")] = 256,
    context: Annotated[int, typer.Option(min=64, max=32767, help="Tokens per window.")] = 256,
    lookahead: Annotated[
        str,
        typer.Option(help="Layers ahead of its block that a predictor reads: 0, 0.5 or 1; or "
                     "embedding, what no context has touched."),
    ] = "0",
    block_size: Annotated[int, typer.Option(min=1, help="Neurons of a unit; 1: each alone.")] = 1,
    density: Annotated[
        float | None,
        typer.Option(help="Share of the units that a layer takes; left out: what --recall needs."),
    ] = None,
    recall: Annotated[
        float, typer.Option(help="Share of the units needed that a layer should take.")
    ] = 0.99,
    most: Annotated[float, typer.Option(help="Largest share that --recall may lead to.")] = 1.0,
    heads: Annotated[
        float | None,
        typer.Option(help="Share of the groups of heads that a layer takes; left out: all of them, "
                     "without a predictor."),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Of a predictor; left out: a sixteenth of the width.")
    ] = None,
    steps: Annotated[int, typer.Option(min=4, help="Updates, of all layers together.")] = 1500,
    batch: Annotated[int, typer.Option(min=1, help="Tokens per update.")] = 512,
    learning_rate: Annotated[float, typer.Option(help="Constant.")] = 1e-3,
    texts: TextsOption = None,
    source: SourceOption = None,
    like: LikeOption = None,
    seed: o.SeedOption = 0,
    force: o.ForceOption = False,
    as_json: o.JsonOption = False,
) -> None:  # fmt: skip
    """Train DejaVu's predictors of neurons and heads (arXiv 2310.17157).

    No weight of the model changes.

    Example: jaxinfer train dejavu tiny-opt --out predictors --run-dir run
    """
    from jaxinfer.cli.models import open_model
    from jaxinfer.files import check_destination
    from jaxinfer.io.sparsity import WHAT, is_sparsity, save_sparsity
    from jaxinfer.progress import bars
    from jaxinfer.train.dejavu.recipe import DejavuRecipe
    from jaxinfer.train.dejavu.training import train_dejavu
    from jaxinfer.train.windows import text_windows

    recipe = DejavuRecipe(
        lookahead=_lookahead(lookahead), block_size=block_size, density=density, recall=recall,
        most=most, heads=heads, rank=rank, steps=steps, batch=batch, learning_rate=learning_rate,
        seed=seed,
    )  # fmt: skip
    check_destination(out, is_sparsity, WHAT, overwrite=force)  # before minutes of work
    lm = open_model(model, "float32")
    recipe.check(lm.config)
    sources = sources_for(lm, source, like, texts)
    tokens = text_windows(lm.encode, sequences, context, seed=seed, sources=sources, folder=texts)
    note(f"{tokens.size} tokens in {sequences} windows, {lm.config.num_layers} layers")
    with bars(transient=False) as report:
        artefact = train_dejavu(
            lm.config, lm.params, tokens, recipe, run_dir, model=lm.name, report=report
        )
    save_sparsity(out, artefact, overwrite=force)
    size = sum(path.stat().st_size for path in out.iterdir())
    if as_json:
        o.print_json({"folder": str(out), "bytes": size} | artefact.config.results)
        return
    print(f"wrote {out} ({size / 1e6:.1f} MB)")
    for row in artefact.config.results["layers"]:
        print(f"layer {row['layer']}: {_found(row)}")


def _lookahead(text: str) -> float | None:
    if text == "embedding":
        return None
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--lookahead must be 0, 0.5, 1 or embedding, got {text!r}") from None


def _found(row: dict[str, Any]) -> str:
    """What a layer's predictors select and find."""
    parts = [
        f"{row[kind]['units']} {what} of which it needs {row[kind]['density']:.0%}, "
        f"recall {row[kind]['recall']:.3f}"
        for kind, what in (("neurons", "units"), ("heads", "groups of heads"))
        if kind in row
    ]
    return "; ".join(parts) or "dense"
