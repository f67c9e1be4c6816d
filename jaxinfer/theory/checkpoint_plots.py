"""Measures of a training's checkpoints as a picture: curves by layer, and a map of all heads.

Needs the extra `plot`.
"""

from pathlib import Path
from typing import Any

import numpy as np

from jaxinfer.files import replacing
from jaxinfer.theory.checkpoints import Dynamics
from jaxinfer.theory.measures.model import PER_HEAD

CURVES = {
    "relative_entropy": "entropy of attention / ln(position)",
    "sink_mass": "mass on the first 4 keys",
    "top_mass": "mass on the 16 largest",
    "heavy_hitter_overlap": "overlap of heavy hitters",
    "stable_rank.up": "stable rank of up",
    "effective_rank.up": "effective rank of up",
    "sparsity": "neurons not active",
    "activity_overlap": "overlap of active neurons",
}
MAPS = ("relative_entropy", "sink_mass")


def plot_dynamics(found: Dynamics, path: str | Path) -> None:
    """Draws curves of the layers' measures and maps of the heads' against steps into the file
    `path` (the ending gives the format), in one step.

    Raises:
        ValueError: if matplotlib is missing, or cannot write the format.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plots need matplotlib; pip install 'jaxinfer[plot]'") from error
    curves = [name for name in CURVES if name in found.measures]
    figure = Figure(figsize=(13, 9), layout="constrained")
    rows = -(-len(curves) // 4)
    parts: Any = figure.subfigures(2, 1, height_ratios=(rows, 1))
    above, below = parts
    colours = colormaps["viridis"]
    for axes, name in zip(above.subplots(rows, 4, squeeze=False).flat, curves, strict=False):
        lines = found.by_layer(name).T
        for layer, line in enumerate(lines):
            colour = colours(layer / max(len(lines) - 1, 1))
            axes.plot(found.steps, line, color=colour, label=f"layer {layer}", linewidth=1.2)
        _with_steps(axes, found.steps)
        axes.set_title(CURVES[name], fontsize=9)
        if name == curves[0] and len(lines) <= 12:
            axes.legend(fontsize=6, frameon=False)
    for axes in above.axes[len(curves) :]:
        axes.set_visible(False)
    for axes, name in zip(below.subplots(1, len(MAPS)), MAPS, strict=True):
        assert name in PER_HEAD
        values = found.measures[name].reshape(len(found.steps), -1).T
        drawn = axes.imshow(values, aspect="auto", cmap="magma", interpolation="nearest")
        axes.set_title(f"{CURVES[name]}, all heads", fontsize=9)
        axes.set(xlabel="step", ylabel="layer")
        axes.set_xticks(range(len(found.steps)), [str(step) for step in found.steps], fontsize=6)
        layers, heads = found.measures[name].shape[1:]
        axes.set_yticks(np.arange(layers) * heads + (heads - 1) / 2, range(layers), fontsize=6)
        below.colorbar(drawn, ax=axes)
    with replacing(path) as temporary:
        metadata = {"Software": None} if temporary.suffix == ".png" else None
        figure.savefig(temporary, dpi=120, metadata=metadata)


def _with_steps(axes: Any, steps: np.ndarray) -> None:
    """A logarithmic axis of steps that begins with 0, as trainings are looked at."""
    positive = steps[steps > 0]
    axes.set_xscale("symlog", linthresh=float(positive.min()) if len(positive) else 1.0)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
