"""`jaxinfer distill`: long convolutions become recurrences of constant cost per token."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from jaxinfer.cli import options as o
from jaxinfer.files import quoted


def distill(
    model: Annotated[str, typer.Argument(help="A model with Hyena layers: a folder of ours.")],
    out: Annotated[Path, typer.Option(help="Folder for the distilled model.")],
    run_dir: Annotated[Path, typer.Option(help="Working folder; a killed run goes on from it.")],
    order: Annotated[
        str, typer.Option(help="Modes of a filter, or auto: what --tolerance needs, per layer.")
    ] = "auto",
    method: Annotated[
        str,
        typer.Option(
            help="hankel+adam; to compare with: paper, balanced, modal, prony, rational (up to 4 "
            "modes), dictionary, fir (samples of as many bytes)."
        ),
    ] = "hankel+adam",
    tolerance: Annotated[
        float, typer.Option(help="Relative error of a filter above which its layer stays exact.")
    ] = 0.01,
    taps: Annotated[
        str, typer.Option(help="Samples copied in front of the modes, or auto: where needed.")
    ] = "auto",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Of gradient descent; left out: the method's own.")
    ] = None,
    all_modal: Annotated[
        bool, typer.Option("--all-modal", help="Give also layers above the tolerance modes.")
    ] = False,
    dtype: o.DtypeOption = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw the filters' errors into this file.")
    ] = None,
    seed: o.SeedOption = 0,
    force: o.ForceOption = False,
    as_json: o.JsonOption = False,
) -> None:
    """Distil a model's long filters to recurrences (Laughing Hyena, arXiv 2310.18780).

    A layer with a filter above the tolerance stays exact. The filters stay in the folder beside
    the modes.

    Example: jaxinfer distill my-hyena --out distilled --run-dir run
    """
    from jaxinfer.cli.models import open_model
    from jaxinfer.distill.model import distill as run
    from jaxinfer.files import check_destination, check_new_file
    from jaxinfer.io.checkpoint import WHAT, is_checkpoint
    from jaxinfer.progress import bars

    modes, copied = _whole("--order", order), _whole("--taps", taps)
    check_destination(out, is_checkpoint, WHAT, overwrite=force)  # before minutes of work
    if plot is not None:
        check_new_file(plot, overwrite=force)
    lm = open_model(model, dtype)
    with bars(transient=False) as report:
        made = run(
            lm, modes, method=method, tolerance=tolerance, taps=copied, steps=steps, seed=seed,
            all_modal=all_modal, run=run_dir, report=report,
        )  # fmt: skip
    if plot is not None:
        from jaxinfer.distill.plot import plot_report

        plot_report(made.report, plot)
    made.save(out, overwrite=force)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    if as_json:
        o.print_json({"folder": str(out), "bytes": size} | made.report.to_dict())
        return
    print(made.report.table())
    print(f"{made.report.summary()}; wrote {out} ({size / 1e6:.1f} MB)")


def _whole(option: str, text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise ValueError(f"{option} must be a whole number or auto, got {quoted(text)}")
    return int(text)
