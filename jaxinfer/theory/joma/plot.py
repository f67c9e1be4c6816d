"""A trajectory as a picture: what every token's weight does, and the entropy of attention.

Needs the extra `plot`.
"""

from pathlib import Path

import numpy as np

from jaxinfer.files import replacing
from jaxinfer.theory.joma.dynamics import Trajectory

MOST_NAMED = 12
"""Tokens that a legend names."""


def plot_trajectory(run: Trajectory, path: str | Path, names: list[str] | None = None) -> None:
    """Draws the run into the file `path` (the ending gives the format), in one step.

    Args:
        run: what `solve` returned.
        path: where to.
        names: of the tokens, for the legend.

    Raises:
        ValueError: if matplotlib is missing, or cannot write the format.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plots need matplotlib; pip install 'jaxinfer[plot]'") from error
    if run.time.ndim > 1:
        raise ValueError("plots are of nodes that share their attention; plot one node at a time")
    size = run.v if run.v.ndim == 2 else np.linalg.norm(run.v, axis=2)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for token, line in enumerate(size.T):
        left.plot(run.time, line, label=names[token] if names else f"token {token}")
    left.set(xlabel="time", ylabel="v" if run.v.ndim == 2 else "length of v")
    if size.shape[1] <= MOST_NAMED:
        left.legend(fontsize=7, frameon=False)
    right.plot(run.time, run.entropy, color="#1b6ca8")
    right.set(xlabel="time", ylabel="entropy of attention (nats)")
    right.axhline(np.log(size.shape[1]), color="#9aa5b1", linewidth=0.8, linestyle=":")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary:
        metadata = {"Software": None} if temporary.suffix == ".png" else None
        figure.savefig(temporary, dpi=144, metadata=metadata)
