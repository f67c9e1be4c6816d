"""A token tree as a PNG: nodes level by level, shaded by the probability that they are accepted.

Needs the extra `plot`. Layout: each subtree is drawn as tightly beside its left neighbour as their
outlines allow, and a parent stands over the middle of its children, so no edges cross.
"""

from pathlib import Path

import numpy as np

from jaxinfer.files import replacing
from jaxinfer.speculative.acceptance import Ranks
from jaxinfer.speculative.expected import expected_tokens, path_probabilities
from jaxinfer.speculative.topology import Topology

EDGE = "#9aa5b1"
TEXT = "#27323f"
TICKS = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.001, 0.0001)


def plot_tree(topology: Topology, path: str | Path, acceptance: Ranks | None = None) -> None:
    """Draws the tree into the file `path` (the ending gives the format), in one step.

    With `acceptance` a node is the darker the more often it is accepted, and small trees carry the
    percentages; without, nodes carry their numbers. Readable up to about 128 nodes.

    Raises:
        ValueError: if matplotlib is missing, or cannot write the format.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.collections import LineCollection
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter
    except ImportError as error:
        raise ValueError("plots need matplotlib; pip install 'jaxinfer[plot]'") from error
    x, y = node_places(topology), -topology.depth.astype(float)
    width, height = np.ptp(x) + 1, topology.levels
    shares = None if acceptance is None else path_probabilities(topology, acceptance)
    gap = 0.52 if topology.nodes <= 40 else 0.3  # inches between neighbours
    figure = Figure(
        figsize=(max(gap * width + (1.6 if shares is not None else 0.9), 4.2), 0.75 * height + 0.9),
        layout="constrained",
    )
    axes = figure.subplots()
    ends = [((x[above], y[above]), (x[i], y[i])) for i, above in enumerate(topology.parent) if i]
    axes.add_collection(LineCollection(ends, colors=EDGE, linewidths=1, zorder=1))
    size = 430 if topology.nodes <= 40 else 150
    if shares is None:
        axes.scatter(x, y, s=size, color="#dbe9f4", edgecolors="#1b6ca8", zorder=2)
        dark = np.zeros(topology.nodes, bool)
    else:
        least = float(np.clip(shares[shares > 0].min(), 1e-4, 0.5))
        scale, colours = LogNorm(least, 1.0, clip=True), colormaps["Blues"]
        drawn = axes.scatter(
            x, y, s=size, c=np.maximum(shares, least), norm=scale, cmap=colours, zorder=2,
            edgecolors="#1b6ca8", linewidths=0.8,
        )  # fmt: skip
        bar = figure.colorbar(
            drawn, ax=axes, pad=0.02, fraction=0.04, aspect=40, shrink=0.8, ticks=TICKS,
            format=FuncFormatter(lambda share, _: f"{share:.2%}".replace(".00", "")),
        )  # fmt: skip
        bar.minorticks_off()  # a logarithmic scale labels them, each in its own way
        bar.ax.set_title("accepted", fontsize=8, color=TEXT)  # beside it a small bar is too short
        bar.ax.tick_params(labelsize=8, colors=TEXT, which="both", length=0)
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
        dark = np.asarray(scale(np.maximum(shares, least))) > 0.55
    font = 7 if topology.nodes <= 40 else 5
    for node in range(topology.nodes):
        text = str(node) if shares is None or topology.nodes > 40 else _percent(shares[node])
        colour = "white" if dark[node] else TEXT
        axes.text(x[node], y[node], text, ha="center", va="center", fontsize=font, color=colour)
    title = str(topology)
    if acceptance is not None:
        title += f"\n{expected_tokens(topology, acceptance):.2f} tokens expected in a step"
    axes.set_title(title, fontsize=9, color=TEXT)
    axes.set_yticks(range(0, -height, -1), [str(level + 1) for level in range(height)])
    axes.set_ylabel("level", color=TEXT)
    axes.tick_params(length=0, labelsize=8, colors=TEXT)
    axes.set_xticks([])
    axes.set_xlim(x.min() - 0.8, x.max() + 0.8)
    axes.set_ylim(-height + 0.45, 0.55)
    for side in axes.spines.values():
        side.set_visible(False)
    with replacing(path) as temporary:
        # a PNG without software versions, so that equal trees give equal bytes
        metadata = {"Software": None} if temporary.suffix == ".png" else None
        figure.savefig(temporary, dpi=144, metadata=metadata)


def node_places(topology: Topology) -> np.ndarray:
    """Where each node stands from left to right, float64 [M]; neighbours are 1 apart or more."""
    offset = np.zeros(topology.nodes)  # from the parent, once a node's siblings are placed
    outlines: list[tuple[list[float], list[float]]] = [([], [])] * topology.nodes
    for node in range(topology.nodes - 1, -1, -1):  # children have larger numbers
        first, count = int(topology.first_child[node]), int(topology.child_count[node])
        left: list[float] = []
        right: list[float] = []  # the outline of the subtrees placed so far, by level
        for child in range(first, first + count):
            child_left, child_right = outlines[child]
            gaps = [r - x for r, x in zip(right, child_left, strict=False)]
            offset[child] = max(gaps) + 1 if gaps else 0.0
            moved = [x + offset[child] for x in child_right]
            left += [x + offset[child] for x in child_left[len(left) :]]
            right = moved + right[len(moved) :]
        middle = (offset[first] + offset[first + count - 1]) / 2 if count else 0.0
        offset[first : first + count] -= middle
        outlines[node] = ([0.0, *(x - middle for x in left)], [0.0, *(x - middle for x in right)])
    for node in range(1, topology.nodes):
        offset[node] += offset[topology.parent[node]]
    return offset - offset.min()


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%" if share >= 0.0095 else "<1%"
