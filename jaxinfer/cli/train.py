"""`jaxinfer train WHAT`: trains the small learned parts that methods need."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jaxinfer.cli import options as o
from jaxinfer.cli.notices import note
from jaxinfer.cli.train_dejavu import dejavu
from jaxinfer.cli.train_lte import lte
from jaxinfer.cli.train_options import LikeOption, SourceOption, TextsOption, sources_for

if TYPE_CHECKING:
    from jaxinfer.cache.feature_maps import LessFeatureMaps

train = typer.Typer(
    name="train",
    help="Train the small learned parts that methods need.\n\nReads the texts that "
    "`python tools/data/fetch_texts.py` of a source checkout fetches.",
    no_args_is_help=True,
)


@train.command()
def less(
    model: Annotated[str, typer.Argument(help=f"The frozen model: {o.MODELS}")],
    out: Annotated[Path, typer.Option(help="Folder for the feature maps.")],
    run_dir: Annotated[Path, typer.Option(help="Working folder; a killed run goes on from it.")],
    sequences: Annotated[int, typer.Option(min=2, help="Windows of text.")] = 64,
    context: Annotated[int, typer.Option(min=64, max=32767, help="Tokens per window.")] = 2048,
    hidden: Annotated[int, typer.Option(min=1, help="Hidden width of a feature map.")] = 64,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the state.")] = 8,
    steps_per_layer: Annotated[int, typer.Option(min=4, help="Updates per layer.")] = 800,
    batch: Annotated[int, typer.Option(min=1, help="Windows per update.")] = 2,
    stride: Annotated[int, typer.Option(min=1, help="Train on every stride-th row.")] = 16,
    dropout: Annotated[float, typer.Option(help="Of hidden units; the paper uses 0.3.")] = 0.0,
    learning_rate: Annotated[float, typer.Option(help="Halved after every quarter.")] = 3e-3,
    texts: TextsOption = None,
    source: SourceOption = None,
    like: LikeOption = None,
    seed: o.SeedOption = 0,
    force: o.ForceOption = False,
    as_json: o.JsonOption = False,
) -> None:
    """Train LESS's feature maps (arXiv 2402.09398).

    They remember what an eviction policy drops.

    Example: jaxinfer train less smollm2-135m --out maps --run-dir run
    """
    from jaxinfer.cache.feature_maps import WHAT, is_less, save_feature_maps
    from jaxinfer.cli.models import open_model
    from jaxinfer.files import check_destination
    from jaxinfer.progress import bars
    from jaxinfer.train.less.recipe import LessRecipe
    from jaxinfer.train.less.training import train_less
    from jaxinfer.train.windows import text_windows

    recipe = LessRecipe(
        hidden=hidden,
        rank=rank,
        steps=steps_per_layer,
        batch=batch,
        stride=stride,
        dropout=dropout,
        learning_rate=learning_rate,
        seed=seed,
    )
    check_destination(out, is_less, WHAT, overwrite=force)  # before hours of work
    lm = open_model(model, "float32")
    sources = sources_for(lm, source, like, texts)
    tokens = text_windows(lm.encode, sequences, context, seed=seed, sources=sources, folder=texts)
    note(f"{tokens.size} tokens in {sequences} windows, {lm.config.num_layers} layers")
    with bars(transient=False) as report:
        maps = train_less(
            lm.config, lm.params, tokens, recipe, run_dir, model=lm.name, report=report
        )
    save_feature_maps(out, maps, overwrite=force)
    _show(maps, out, as_json)


def _show(maps: "LessFeatureMaps", out: Path, as_json: bool) -> None:
    layers = maps.config.results["layers"]
    size = sum(path.stat().st_size for path in out.iterdir())
    record = {
        "folder": str(out),
        "bytes": size,
        "recovered": sum(row["recovered"] for row in layers) / len(layers),
        "recovered_beyond_plus": sum(row["recovered_beyond_plus"] for row in layers) / len(layers),
    }
    if as_json:
        o.print_json(record | {"layers": json.loads(json.dumps(layers))})
        return
    print(f"wrote {out} ({size / 1e6:.1f} MB)")
    print(f"{record['recovered']:.0%} of the error that eviction causes is gone")
    print(f"{record['recovered_beyond_plus']:.0%} of what more tokens in the same memory leave")


@train.command()
def draft(
    target: Annotated[str, typer.Argument(help=f"The target: {o.MODELS}")],
    out: Annotated[Path, typer.Option(help="Folder for the draft.")],
    run_dir: Annotated[Path, typer.Option(help="Working folder; a killed run goes on from it.")],
    recurrent: Annotated[
        bool, typer.Option("--recurrent", help="A cell that goes on from the target's last state.")
    ] = False,
    layers: Annotated[int, typer.Option(min=1, help="Layers, or blocks of a cell.")] = 2,
    width: Annotated[
        int | None,
        typer.Option(help="Width of a draft of its own; left out: layers of the target."),
    ] = None,
    vocabulary: Annotated[
        int, typer.Option(min=16, help="Tokens that a draft of the target's layers proposes.")
    ] = 8192,
    windows: Annotated[int, typer.Option(min=2, help="Windows of text.")] = 2048,
    context: Annotated[int, typer.Option(min=32, max=32767, help="Tokens per window.")] = 256,
    own: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of windows that the target writes.")
    ] = 0.5,
    steps: Annotated[int, typer.Option(min=4, help="Updates.")] = 3000,
    batch: Annotated[int, typer.Option(min=1, help="Windows per update.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Peak; falls to 0 as a cosine.")] = 3e-3,
    optimizer: Annotated[str, typer.Option(help="muon, or adamw: cheap steps.")] = "muon",
    weights: Annotated[
        str | None, typer.Option(help="int8: learn from a target that is stored in fewer bits.")
    ] = None,
    texts: TextsOption = None,
    source: SourceOption = None,
    seed: o.SeedOption = 0,
    force: o.ForceOption = False,
    as_json: o.JsonOption = False,
) -> None:
    """Distil a draft for speculative decoding (arXiv 2402.12374).

    Example: jaxinfer train draft tiny-llama --width 96 --out draft --run-dir run
    """
    from dataclasses import asdict

    from jaxinfer.cli.models import open_model
    from jaxinfer.progress import bars
    from jaxinfer.train.draft.recipe import DraftRecipe
    from jaxinfer.train.draft.training import check_out, save_trained, train_draft
    from jaxinfer.train.windows import text_windows

    recipe = DraftRecipe(
        recurrent=recurrent, layers=layers, width=width, vocabulary=vocabulary,
        windows=windows, context=context, own=own, steps=steps, batch=batch,
        learning_rate=learning_rate, optimizer=optimizer, seed=seed,
    )  # fmt: skip
    check_out(out, recipe, overwrite=force)  # before hours of work
    lm = open_model(target, "float32", weights)
    tokens = text_windows(
        lm.encode, windows, context, seed=seed, sources=source or None, folder=texts
    )
    note(f"{tokens.size} tokens in {windows} windows")
    with bars(transient=False) as report:
        student, trained, metrics = train_draft(lm, tokens, recipe, run_dir, report=report)
    record = {"recipe": asdict(recipe) | {"weights": weights}, "results": metrics}
    save_trained(out, lm, student, trained, record, overwrite=force)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    if as_json:
        o.print_json({"folder": str(out), "bytes": size} | metrics)
        return
    print(f"wrote {out} ({size / 1e6:.1f} MB)")
    print(f"a first guess is accepted with probability {metrics['overlap']:.2f} at temperature 1,")
    print(f"{metrics['agreement']:.2f} at temperature 0 (on training text)")


train.command()(dejavu)
train.command()(lte)
