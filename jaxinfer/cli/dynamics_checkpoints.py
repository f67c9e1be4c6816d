"""`jaxinfer dynamics --checkpoints`: what a real training did, checkpoint by checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxinfer.cli import options as o
from jaxinfer.cli.notices import note

if TYPE_CHECKING:
    from jaxinfer.theory.checkpoints import Dynamics

SHOWN = ("relative_entropy", "sink_mass", "stable_rank.up", "sparsity")
"""Measures of the table; JSON has all of them."""


def show_checkpoints(
    folder: Path,
    text: str,
    run_dir: Path,
    *,
    window: int,
    windows: int,
    plot: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Measures the checkpoints in a folder, prints how each layer's numbers dropped and came back,
    and draws them."""
    from jaxinfer.cli.text_input import read_text
    from jaxinfer.files import check_new_file
    from jaxinfer.progress import bars
    from jaxinfer.theory.checkpoints import measure_checkpoints, snapshots_in

    if plot is not None:
        check_new_file(plot, overwrite=force)
    snapshots = snapshots_in(folder.expanduser())
    note(f"{len(snapshots)} checkpoints, steps {snapshots[0].step} to {snapshots[-1].step}")
    with bars(transient=False) as report:
        found = measure_checkpoints(
            snapshots, read_text(text), run_dir, window=window, windows=windows, report=report
        )
    if plot is not None:
        from jaxinfer.theory.checkpoint_plots import plot_dynamics

        plot_dynamics(found, plot)
    if not as_json:
        _show(found)
        return
    o.print_json(
        {
            "steps": found.steps.tolist(),
            "checkpoints": [one.folder.name for one in snapshots],
            "measures": {name: x.tolist() for name, x in found.measures.items()},
            "rebounds": {
                name: [one._asdict() for one in found.rebounds(name)] for name in found.measures
            },
        }
    )


def _show(found: "Dynamics") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("measure", "layer", "first", "lowest", "at step", "last", "rebound")
    for name in SHOWN:
        if name not in found.measures:
            continue
        for layer, one in enumerate(found.rebounds(name)):
            share = "" if np.isnan(one.rebound) else f"{one.rebound:.0%}"
            numbers = (f"{x:.4g}" for x in (one.first, one.lowest, one.last))
            first, lowest, last = numbers
            table.add_row(name, str(layer), first, lowest, str(one.step), last, share)
    console = Console()
    console.print(table)
    console.print(
        "rebound: the part of its fall that a number has made good; --json has all measures"
    )
