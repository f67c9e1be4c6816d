"""The figures of contextual and learned sparsity (DejaVu, arXiv 2310.17157; LTE, 2402.06126) and of
what they are compared with.

    python tools/reproduce/reproduce_sparsity.py quality MODEL  # and tasks, by FLOPs, bytes
    python tools/reproduce/reproduce_sparsity.py recall MODEL --methods deja_vu,random
    python tools/reproduce/reproduce_sparsity.py layers MODEL --methods lte,oracle,cats
    python tools/reproduce/reproduce_sparsity.py tokens MODEL --methods lte  # unions, overlap
    python tools/reproduce/reproduce_sparsity.py heads MODEL --method deja_vu
    python tools/reproduce/reproduce_sparsity.py speed MODEL --sparsity lte  # or random routers

Held-out documents judge, training texts calibrate. All tokens are sparse (GRIFFIN: all behind the
prompt). Intervals are 95 % bootstraps over documents.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.reproduce.figures import RESULTS, publish_records
from tools.reproduce.sparsity_study import Study, curves, label_of, row_of

SOURCES = "essays,brown,anarchism,pydoc,kjv"
METHODS = (
    "oracle-neurons,oracle,random-neurons,random,static,cats,teal,wina,griffin,moefication-oracle,"
    "moefication"
)
BATCHES = (1, 2, 4, 8, 16)
app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)

ModelArgument = Annotated[str, typer.Argument(help="Model name or folder.")]
MethodsOption = Annotated[str, typer.Option(help="Names, separated by commas.")]
DensitiesOption = Annotated[str, typer.Option(help="Shares, separated by commas.")]
BlockOption = Annotated[int, typer.Option(help="Neurons of a block.")]
RowsOption = Annotated[int, typer.Option(help="Held-out documents.")]
TokensOption = Annotated[int, typer.Option(help="Tokens of each.")]
CalibrationOption = Annotated[int, typer.Option(help="Training texts to calibrate on.")]
SourcesOption = Annotated[str, typer.Option(help="Sources of the documents.")]
FolderOption = Annotated[Path, typer.Option(help="Where the figure is written.")]


@app.command()
def quality(
    model: ModelArgument = "tiny-opt",
    methods: MethodsOption = METHODS,
    densities: DensitiesOption = "0.75,0.5,0.375,0.25,0.125,0.0625",
    block_size: BlockOption = 32,
    rows: RowsOption = 32,
    tokens: TokensOption = 256,
    calibration: CalibrationOption = 8,
    sources: SourcesOption = SOURCES,
    new_tokens: Annotated[int, typer.Option(help="Of the continuations.")] = 64,
    folder: FolderOption = RESULTS,
) -> None:
    """Perplexity against equal products and equal bytes, beside int8, and the tasks."""
    import jaxinfer as ji
    from jaxinfer.eval.sparsity import SparsityEvaluation, Tasks, paired, text_losses

    study = Study(model, methods, densities, block_size, rows, tokens, calibration, sources)
    tasks = Tasks(prompt_tokens=min(64, tokens // 2), new_tokens=new_tokens)
    evaluation = SparsityEvaluation(study.lm, study.rows, tasks)
    records = [evaluation.judge()]
    eight = ji.load(model, dtype="float32", weights="int8")
    losses = text_losses(eight.config, eight.params, study.rows)
    records.append(
        {"method": "int8", "layer_products": 1.0, "layer_bytes": int8_share(study.lm, eight)}
        | paired(evaluation.dense_losses, losses)
    )
    for label, method in study.methods:
        records.append(evaluation.judge(method, label))
        print(f"{label_of(records[-1])}: {records[-1]['relative']:.4f}", file=sys.stderr)
    name, command = study.lm.name, study.command("quality", f" --new-tokens {new_tokens}")
    config = study.config | {"new_tokens": new_tokens}
    for axis, words in (
        ("layer_products", "products of the layers"), ("layer_bytes", "bytes of the layers")
    ):  # fmt: skip
        keys = ("density", "used", axis, "perplexity", "low", "high", "relative", "relative_low",
                "relative_high")  # fmt: skip
        publish_records(
            f"sparsity-{axis.removeprefix('layer_')}-{name}",
            f"Perplexity of {name} over the dense model's, by {words}",
            config, [row_of(one, keys) for one in records],
            lambda axes, axis=axis, words=words: _plot_quality(axes, records, axis, words),
            seed=0, command=command, folder=folder,
        )  # fmt: skip
    publish_records(
        f"sparsity-tasks-{name}", f"What {name} still copies and continues as the dense model does",
        config, [row_of(one, ("density", "used", "layer_products", "copied", "agreement", "rougeL"))
                 for one in records],
        lambda axes: _plot_tasks(axes, records), seed=0, command=command, folder=folder,
    )  # fmt: skip


def int8_share(lm: Any, eight: Any) -> float:
    """The bytes of the layers' weights in int8 over those in float32."""
    import jax

    sizes = [
        sum(leaf.nbytes for leaf in jax.tree.leaves(one.params["layers"])) for one in (eight, lm)
    ]
    return sizes[0] / sizes[1]


def _give_colours(axes: Any) -> None:
    """One for each of up to 20 methods."""
    from matplotlib import colormaps

    axes.set_prop_cycle(color=colormaps["tab20"].colors)


def _plot_quality(axes: Any, records: Sequence[dict[str, Any]], axis: str, words: str) -> None:
    _give_colours(axes)
    for name, group in curves(records).items():
        group = sorted(group, key=lambda one: one[axis])
        x, y = ([one[key] for one in group] for key in (axis, "relative"))
        error = [
            [max(one["relative"] - one["relative_low"], 0) for one in group],
            [max(one["relative_high"] - one["relative"], 0) for one in group],
        ]
        axes.errorbar(x, y, yerr=np.nan_to_num(error), marker="o", ms=3, lw=1, label=name)
    axes.set_yscale("log")
    axes.set_xlabel(f"share of the dense {words}")
    axes.set_ylabel("perplexity over dense")
    axes.legend(frameon=False, fontsize=7, ncols=2)


def _plot_tasks(axes: Any, records: Sequence[dict[str, Any]]) -> None:
    _give_colours(axes)
    task = "rougeL" if "rougeL" in records[0] else "agreement"
    for name, group in curves([one for one in records if task in one]).items():
        points = sorted((one["layer_products"], one[task]) for one in group)
        axes.plot(*zip(*points, strict=True), marker="o", ms=3, lw=1, label=name)
    axes.set_xlabel("share of the dense products of the layers")
    axes.set_ylabel(f"{task} against the dense model")
    axes.legend(frameon=False, fontsize=7, ncols=2)


def _per_layer(
    command: str, study: Study, records: Sequence[dict[str, Any]], key: str, title: str,
    label: str, folder: Path,
) -> None:  # fmt: skip
    """A figure with the layers on the x axis."""

    def plot(axes) -> None:
        for record in records:
            axes.plot(
                range(len(record[key])), record[key], marker="o", ms=3, label=label_of(record)
            )
        axes.set_xlabel("layer")
        axes.set_ylabel(label)
        axes.set_ylim(0, 1.02)
        axes.legend(frameon=False, fontsize=7, ncols=2)

    table = []
    for record in records:
        means = {"mean": float(np.mean(record[key])), "least": float(np.min(record[key])),
                 "most": float(np.max(record[key]))}  # fmt: skip
        named = {"method": record["method"], "density": record.get("density"), key: record[key]}
        table.append(row_of(named | means))
    publish_records(
        f"sparsity-{command}-{study.lm.name}", title, study.config, table, plot, seed=0,
        command=study.command(command), folder=folder,
    )  # fmt: skip


@app.command()
def recall(
    model: ModelArgument = "tiny-opt",
    methods: MethodsOption = "deja_vu,random",
    densities: DensitiesOption = "0.5,0.25,0.125",
    block_size: BlockOption = 1,
    rows: RowsOption = 8,
    tokens: TokensOption = 256,
    calibration: CalibrationOption = 8,
    sources: SourcesOption = SOURCES,
    folder: FolderOption = RESULTS,
) -> None:
    """The recall of what is selected before the block runs, layer by layer."""
    from jaxinfer.eval.selection import judged

    study = Study(model, methods, densities, block_size, rows, tokens, calibration, sources)
    records = []
    for record, params in study.forms():
        found = [x for x in judged(study.lm.config, params, study.rows[:, :-1]) if x is not None]
        records.append(record | {"recall_per_layer": [one["recall"] for one in found]})
    title = f"Recall of the neurons that matter, {study.lm.name}"
    _per_layer("recall", study, records, "recall_per_layer", title, "recall", folder)


@app.command()
def layers(
    model: ModelArgument = "tiny-opt",
    methods: MethodsOption = "lte,oracle,cats",
    densities: DensitiesOption = "1,0.25",
    block_size: BlockOption = 1,
    rows: RowsOption = 8,
    tokens: TokensOption = 256,
    calibration: CalibrationOption = 8,
    sources: SourcesOption = SOURCES,
    folder: FolderOption = RESULTS,
) -> None:
    """The density of every layer; the oracle at 1 shows which neurons are not zero."""
    import jax.numpy as jnp

    from jaxinfer.sparsity.accounting import measure

    study = Study(model, methods, densities, block_size, rows, tokens, calibration, sources)
    records = []
    for record, params in study.forms():
        used = measure(study.lm.config, params, jnp.asarray(study.rows[:, :-1])).blocks
        records.append(record | {"used_per_layer": list(used)})
    title = f"Share of the neurons in use, {study.lm.name}"
    _per_layer("layers", study, records, "used_per_layer", title, "density", folder)


@app.command()
def tokens(
    model: ModelArgument = "tiny-opt",
    methods: MethodsOption = "lte,oracle,random",
    densities: DensitiesOption = "0.25",
    block_size: BlockOption = 32,
    rows: RowsOption = 16,
    tokens: TokensOption = 256,
    calibration: CalibrationOption = 8,
    sources: SourcesOption = SOURCES,
    folder: FolderOption = RESULTS,
) -> None:
    """What several tokens use together, and neighbouring ones have in common."""
    from jaxinfer.eval.selection import neighbour_overlap, selections, unions

    study = Study(model, methods, densities, block_size, rows, tokens, calibration, sources)
    table = []
    for record, params in study.forms():
        found = selections(study.lm.config, params, study.rows[:, :-1])
        found = [one for one in found if one.shape[-1] > 1]
        shares = np.mean([unions(one, BATCHES) for one in found], axis=0).tolist()
        overlap = float(np.mean([neighbour_overlap(one) for one in found]))
        metrics = {f"union {size}": x for size, x in zip(BATCHES, shares, strict=True)}
        table.append(row_of(record | metrics | {"neighbours share": overlap}))

    def plot(axes) -> None:
        for row in table:
            shares = [row[f"union {size}"] for size in BATCHES]
            (line,) = axes.plot(BATCHES, shares, marker="o", ms=3, label=row["row"])
            alone = [1 - (1 - shares[0]) ** size for size in BATCHES]
            axes.plot(BATCHES, alone, ls=":", lw=1, color=line.get_color())
        axes.set_xscale("log", base=2)
        axes.set_xticks(BATCHES, [str(size) for size in BATCHES])
        axes.set_xlabel("tokens of a step (dotted: if they were independent)")
        axes.set_ylabel("share of the blocks that they use")
        axes.legend(frameon=False, fontsize=8)

    def plot_overlap(axes) -> None:
        shared = [row["neighbours share"] for row in table]
        bars = axes.barh([row["row"] for row in table][::-1], shared[::-1])
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
        axes.plot([row["union 1"] for row in table][::-1], range(len(table)), "k|", ms=14)
        axes.set_xlabel("share of a token's blocks that the one before it used (line: by chance)")

    for name, title, draw in (
        ("unions", "Blocks that several tokens use together", plot),
        ("overlap", "Blocks that neighbouring tokens share", plot_overlap),
    ):
        publish_records(
            f"sparsity-{name}-{study.lm.name}", f"{title}, {study.lm.name}", study.config, table,
            draw, seed=0, command=study.command("tokens"), folder=folder,
        )  # fmt: skip


@app.command()
def heads(
    model: ModelArgument = "tiny-opt",
    method: Annotated[str, typer.Option(help="A method with predictors of heads.")] = "deja_vu",
    shares: Annotated[str, typer.Option(help="Of the groups of heads.")] = "1,0.75,0.5,0.25",
    rows: RowsOption = 32,
    tokens: TokensOption = 256,
    sources: SourcesOption = SOURCES,
    folder: FolderOption = RESULTS,
) -> None:
    """Perplexity by the share of the heads that predictors choose, all neurons in use."""
    from jaxinfer.eval.sparsity import SparsityEvaluation, Tasks
    from jaxinfer.names import sparsity_of

    study = Study(model, "oracle", "1", 1, rows, tokens, 1, sources)
    none = Tasks(recall_rows=0, prompts=0)
    evaluation = SparsityEvaluation(study.lm, study.rows, none)
    keys = ("heads", "layer_products", "perplexity", "low", "high", "relative", "relative_low",
            "relative_high")  # fmt: skip
    table = [row_of(evaluation.judge() | {"heads": 1.0}, keys)]
    for share in (float(x) for x in shares.split(",")):
        chosen = sparsity_of({"name": method, "density": 1.0, "heads": share}, study.lm.name)
        record = evaluation.judge(chosen) | {"method": f"heads {share:g}", "density": None}
        table.append(row_of(record | {"heads": share}, keys))
        print(f"heads {share:g}: {record['relative']:.4f}", file=sys.stderr)

    def plot(axes) -> None:
        chosen = table[1:]
        means = np.array([row["relative"] for row in chosen])
        error = [
            means - [row["relative_low"] for row in chosen],
            [row["relative_high"] for row in chosen] - means,
        ]
        x = [row["heads"] for row in chosen]
        axes.errorbar(x, means, yerr=np.abs(np.nan_to_num(error)), marker="o")
        axes.set_xlabel("share of the groups of heads")
        axes.set_ylabel("perplexity over dense")

    command = f"python tools/reproduce/reproduce_sparsity.py heads {model} --method {method} "
    command += f"--shares {shares} --rows {rows} --tokens {tokens} --sources {sources}"
    config = study.config | {"method": method, "shares": shares}
    title = f"Perplexity of {study.lm.name} with some of its heads"
    publish_records(
        f"sparsity-heads-{study.lm.name}", title, config, table, plot, seed=0, command=command,
        folder=folder,
    )  # fmt: skip


@app.command()
def speed(
    model: ModelArgument = "opt-random",
    sparsity: Annotated[str | None, typer.Option(help="A method; none: random routers.")] = None,
    weights: Annotated[str | None, typer.Option(help="int8 or int4, also dense.")] = None,
    trees: Annotated[bool, typer.Option("--trees", help="Trees instead of batches.")] = False,
    only: Annotated[str | None, typer.Option(help="Sizes of batches or trees: 1,8.")] = None,
    preset: Annotated[str, typer.Option(help="Sizes: a file of bench/presets.")] = "standard",
    rounds: Annotated[int | None, typer.Option(help="Interleaved rounds.")] = None,
    folder: FolderOption = RESULTS,
) -> None:
    """The time of a decode step against the dense one by density and batch, or by the nodes of a
    tree: `jaxinfer bench sparsity`, as a figure."""
    from bench.command import progress
    from bench.options import Options
    from bench.routines import sparsity as routine

    options = Options(
        model=model, preset=preset, sparsity=sparsity, weights=weights, rounds=rounds,
        say=progress("sparsity"),
    )  # fmt: skip
    chosen = None if only is None else [int(x) for x in only.split(",")]
    found, table = routine.run(options, trees, chosen), []
    for config, metrics in found:
        tokens = config["tree"] if trees else config["batch"]
        for label, ratios in metrics["ratios"].items():
            row = {
                "row": f"{label}, {'tree of' if trees else 'batch'} {tokens}", "tokens": tokens,
                "speedup": ratios["median"], "slowest": ratios["min"], "fastest": ratios["max"],
                "ms_per_step": metrics[label]["ms_per_step"]["median"],
                "dense_ms": metrics["dense"]["ms_per_step"]["median"],
                "layers_that_list": metrics["lists"][label],
                "same_tokens_as_masked": metrics["same_tokens_as_masked"][label],
            }  # fmt: skip
            table.append(row)

    def plot(axes) -> None:
        for label in dict.fromkeys(row["row"].split(",")[0] for row in table):
            picked = [row for row in table if row["row"].startswith(f"{label},")]
            medians = np.array([row["speedup"] for row in picked])
            error = [
                medians - [r["slowest"] for r in picked],
                [r["fastest"] for r in picked] - medians,
            ]
            tokens = [r["tokens"] for r in picked]
            axes.errorbar(tokens, medians, yerr=error, marker="o", label=label)
        axes.axhline(1, color="grey", lw=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("nodes of the tree" if trees else "batch")
        axes.set_ylabel("dense over sparse time of a step")
        axes.legend(frameon=False, fontsize=8)

    given = {"sparsity": sparsity, "weights": weights, "only": only, "preset": preset,
             "rounds": rounds}  # fmt: skip
    words = [f"--{name} {value}" for name, value in given.items() if value is not None]
    command = " ".join(["python tools/reproduce/reproduce_sparsity.py speed", model, *words])
    routers = "routers" if sparsity is None and model != "opt-random" else None
    parts = "trees" if trees else "speed", Path(model).name, weights, routers
    name = "-".join(part for part in parts if part)
    title = f"A decode step of {Path(model).name}{f' in {weights}' if weights else ''}"
    publish_records(
        f"sparsity-{name}", f"{title}{' with trees' if trees else ''}, dense over sparse",
        found[0][0] | {"tokens": sorted({row["tokens"] for row in table})}, table, plot, seed=0,
        command=command + (" --trees" if trees else ""), folder=folder,
    )  # fmt: skip


if __name__ == "__main__":
    app()
