"""`jaxinfer dynamics`: how attention and MLP weights of a block move together in training."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxinfer.cli import options as o
from jaxinfer.files import quoted

if TYPE_CHECKING:
    from jaxinfer.theory.joma import Trajectory

ROWS = 11  # of the table


def dynamics(
    field: Annotated[
        str, typer.Option("--field", help="How logits become attention: linear, exp or softmax.")
    ] = "exp",
    mu: Annotated[
        str | None,
        typer.Option(
            "--mu", metavar="NUMBERS", help="Where the weights go, per token: nonlinear activation."
        ),
    ] = None,
    delta: Annotated[
        str | None,
        typer.Option(
            "--delta", metavar="NUMBERS", help="Saliency per token instead: identity activation."
        ),
    ] = None,
    until: Annotated[
        float | None, typer.Option("--until", help="The last time; default: 10, or the blow-up.")
    ] = None,
    points: Annotated[
        int, typer.Option("--points", min=2, max=100_000, help="Times that are computed.")
    ] = 201,
    time: Annotated[
        str, typer.Option("--time", help="raw, or softmax: the time in which nothing blows up.")
    ] = "raw",
    temperature: Annotated[float, typer.Option("--temperature", help="Of the attention.")] = 1.0,
    solver: Annotated[
        str, typer.Option("--solver", help="tsit5, kvaerno5 (stiff), or rk4 (without diffrax).")
    ] = "tsit5",
    checkpoints: Annotated[
        Path | None,
        typer.Option(
            "--checkpoints",
            metavar="FOLDER",
            help="Instead: measure a real training, whose checkpoints are in this folder.",
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option("--text", metavar="FILE", help="What checkpoints read; - is standard input."),
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option("--run-dir", help="For --checkpoints; a killed run goes on from it."),
    ] = None,
    window: Annotated[
        int,
        typer.Option("--window", min=2, max=32767, help="Tokens that checkpoints read at once."),
    ] = 256,
    windows: Annotated[
        int, typer.Option("--windows", min=1, max=4096, help="Of the text, spread over it.")
    ] = 8,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw it into this file.")] = None,
    force: o.ForceOption = False,
    as_json: o.JsonOption = False,
) -> None:
    """Follow JoMA's training dynamics of one block, or measure those of a real training.

    With --mu attention grows sparse, then dense again; with --delta a winner takes all. With
    --checkpoints it is told per layer how attention, ranks and active neurons dropped and rose.

    Example: jaxinfer dynamics --field exp --mu 0.5,1,1.5,2,2.5 --until 9 --plot dynamics.png

    Example: jaxinfer dynamics --checkpoints snapshots --text essay.txt --run-dir run
    """
    if checkpoints is not None:
        from jaxinfer.cli.dynamics_checkpoints import show_checkpoints

        if text is None or run_dir is None or mu is not None or delta is not None:
            raise ValueError(
                "--checkpoints goes with --text FILE and --run-dir FOLDER, and without --mu and "
                "--delta, which are of the equations"
            )
        show_checkpoints(
            checkpoints, text, run_dir, window=window, windows=windows, plot=plot, force=force,
            as_json=as_json,
        )  # fmt: skip
        return
    if text is not None or run_dir is not None:
        raise ValueError(
            "--text and --run-dir are for checkpoints; give their --checkpoints FOLDER"
        )
    from jaxinfer.files import check_new_file
    from jaxinfer.theory.joma import closed_forms, solve

    if plot is not None:
        check_new_file(plot, overwrite=force)
    given = {"mu": _numbers("--mu", mu), "delta": _numbers("--delta", delta)}
    blow_up = math.inf
    if given["delta"] is not None and field == "exp":
        blow_up = closed_forms.blow_up_time(given["delta"]) * temperature
    if until is None:
        explodes = time == "raw" and math.isfinite(blow_up)
        until = blow_up if explodes else 10.0
    options: dict[str, Any] = {"field": field, "time": time, "solver": solver, **given}  # texts
    run = solve(until=until, points=points, temperature=temperature, **options)
    if plot is not None:
        from jaxinfer.theory.joma.plot import plot_trajectory

        tokens = [float(x) for x in (given["mu"] or given["delta"] or ())]
        plot_trajectory(run, plot, [f"{x:g}" for x in tokens])
    if as_json:
        arrays = {name: getattr(run, name).tolist() for name in ("time", "softmax_time", "v", "z")}
        o.print_json(
            {"field": field, **given, "blow_up_time": blow_up, "stopped": run.stopped, **arrays}
            | {"entropy": run.entropy.tolist()}
        )
        return
    _show(run, blow_up)


def _numbers(option: str, text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} expects numbers such as 0.5,1,2, got {quoted(text)}") from None


def _show(run: "Trajectory", blow_up: float) -> None:
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    tokens = run.v.shape[1]
    shown = min(tokens, 8)
    names = [f"v{token}" for token in range(shown)] + ["..."] * (shown < tokens)
    table = Table("time", "entropy", *names)
    count = len(run.time)
    for row in sorted({round(i * (count - 1) / (ROWS - 1)) for i in range(ROWS)}):
        values = [f"{x:.6g}" for x in run.v[row, :shown]] + [""] * (shown < tokens)
        table.add_row(f"{run.time[row]:.6g}", f"{run.entropy[row]:.4f}", *values)
    console = Console()
    console.print(table)
    lowest = int(np.argmin(run.entropy))
    console.print(
        f"entropy {run.entropy[0]:.4f} at first, lowest {run.entropy[lowest]:.4f} at "
        f"{run.time[lowest]:.4g}, {run.entropy[-1]:.4f} at last (uniform: {np.log(tokens):.4f})"
    )
    if run.stopped and math.isfinite(blow_up):
        console.print(f"ended before the weights become infinite, at time {blow_up:.10g}")
