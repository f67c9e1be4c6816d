"""The distillation of a model as a picture: the error of every filter, layer by layer, over what
no model of its order can beat.

Needs the extra `plot`.
"""

from pathlib import Path

import numpy as np

from jaxinfer.distill.report import ModelReport
from jaxinfer.files import replacing

LEAST = 1e-8  # of a logarithmic axis


def plot_report(report: ModelReport, path: str | Path) -> None:
    """Draws the report into the file `path` (the ending gives the format), in one step.

    Raises:
        ValueError: if matplotlib is missing, or cannot write the format.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plots need matplotlib; pip install 'jaxinfer[plot]'") from error
    figure = Figure(figsize=(max(5.0, 1.5 + 0.6 * len(report.layers)), 4), layout="constrained")
    axes = figure.subplots()
    for place, one in enumerate(report.layers):
        rows = one.filters.filters
        spread = np.linspace(-0.3, 0.3, len(rows)) if len(rows) > 1 else np.zeros(1)
        named = place == 0
        colour = "#1b6ca8" if one.form == "modal" else "#c4572f"
        for name, marker, shade in (("error", "o", colour), ("bound", "_", "#9aa5b1")):
            values = np.maximum([getattr(row, name) for row in rows], LEAST)
            label = {"error": "error", "bound": "bound"}[name] if named else None
            axes.scatter(place + spread, values, s=9, marker=marker, c=shade, label=label)
    axes.axhline(
        report.layers[0].filters.tolerance, color="#27323f", linewidth=0.8, linestyle=":",
        label="tolerance",
    )  # fmt: skip
    names = [
        f"{one.layer}\nK={one.filters.modes}" + ("\nexact" if one.form == "exact" else "")
        for one in report.layers
    ]
    axes.set_xticks(range(len(names)), names, fontsize=7)
    axes.set(yscale="log", xlabel="layer", ylabel="relative l2 error of a filter")
    axes.legend(fontsize=7, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary:
        metadata = {"Software": None} if temporary.suffix == ".png" else None
        figure.savefig(temporary, dpi=144, metadata=metadata)
