"""PNG plots of the report: decode rates side by side, and time per token against the context."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxinfer.files import replacing
from jaxinfer.records import Record

COLOURS = {
    "jaxinfer": "#1b6ca8",
    "torch": "#d9822b",
    "llama.cpp": "#7a5195",
    "dots-only": "#9aa5b1",
    "jaxinfer int8": "#57a0d3",
    "transformers": "#d9822b",
    "generate": "#9aa5b1",
}


def decode(records: Sequence[Record], path: Path) -> None:
    """Bars of tokens per second, one group per model and batch; whiskers are the rounds' range."""
    figure, axes = _figure()
    groups = sorted(records, key=lambda r: (r.config["model"], r.config["batch"]))
    names = [name for name in COLOURS if any(name in r.metrics for r in groups)]
    width = 0.8 / max(len(names), 1)
    for index, name in enumerate(names):
        places, rates = [], []
        for group, record in enumerate(groups):
            if name in record.metrics:
                places.append(group + (index - (len(names) - 1) / 2) * width)
                rates.append(record.metrics[name]["tokens_per_s"])
        heights = [rate["median"] for rate in rates]
        below = [rate["median"] - rate["min"] for rate in rates]
        above = [rate["max"] - rate["median"] for rate in rates]
        bars = axes.bar(
            places,
            heights,
            0.92 * width,
            yerr=[below, above],
            capsize=2,
            color=COLOURS[name],
            label=name,
        )
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=7)
    labels = [f"{r.config['model']}\nbatch {r.config['batch']}" for r in groups]
    axes.set_xticks(range(len(groups)), labels)
    axes.set_ylabel("tokens per second")
    axes.set_title("Decode, float32 (llama.cpp: 4-bit weights)")
    axes.legend(frameon=False)
    _save(figure, path)


def context_scaling(records: Sequence[Record], path: Path) -> None:
    """Milliseconds per token against live context, one line per capacity, and the floor."""
    figure, axes = _figure()
    styles = ("-o", "--s", ":^", "-.d")
    for index, record in enumerate(records):
        points = record.metrics["points"]
        prefix = f"{record.config['model']}, " if len(records) > 1 else ""
        colour = list(COLOURS.values())[index % len(COLOURS)]
        for style, factor in zip(styles, sorted({p["factor"] for p in points}), strict=False):
            line = [p for p in points if p["factor"] == factor]
            axes.plot(
                [p["context"] for p in line],
                [p["ms_per_token"]["median"] for p in line],
                style,
                color=colour,
                label=f"{prefix}capacity {factor}x the context",
            )
        floor = {p["context"]: p["floor_ms"] for p in points}
        axes.plot(
            list(floor), list(floor.values()), color="#9aa5b1", label=f"{prefix}bandwidth floor"
        )
        axes.set_xticks(list(floor), [str(live) for live in floor])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("live context, tokens")
    axes.set_ylabel("milliseconds per token")
    title = "Decode at batch 1 against live context"
    models = {record.config["model"] for record in records}
    axes.set_title(f"{title}, {models.pop()}" if len(models) == 1 else title)
    axes.legend(frameon=False)
    _save(figure, path)


def serving(records: Sequence[Record], path: Path) -> None:
    """Tokens per second, and the time to the first token, against the number of clients, a panel
    each; then the first token's time against the rate at which requests come."""
    figure = _figure()[0]
    figure.clear()
    figure.set_size_inches(10, 3.6)
    panels = figure.subplots(1, 3)
    closed = sorted(
        (r for r in records if r.config["loop"] == "closed"), key=lambda r: r.config["clients"]
    )
    for name, colour in COLOURS.items():
        found = [(r.config["clients"], r.metrics[name]) for r in closed if name in r.metrics]
        for axes, key in zip(panels, ("tokens_per_s", "first_p50_ms"), strict=False):
            points = [(count, one[key]["median"]) for count, one in found if key in one]
            if points:
                axes.plot(*zip(*points, strict=True), "-o", ms=4, color=colour, label=name)
    for axes, label in zip(panels, ("tokens per second", "first token, ms (p50)"), strict=False):
        axes.set_xlabel("clients")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=7)
    opened = sorted(
        ((r.metrics["rate"], r) for r in records if r.config["loop"] == "open"),
        key=lambda pair: pair[0],
    )
    for key, style in (("first_p50_ms", "-o"), ("first_p95_ms", "--s")):
        points = [(rate, r.metrics["jaxinfer"][key]) for rate, r in opened]
        label = f"first token, {key[6:9]}"
        panels[2].plot(
            *zip(*points, strict=True), style, ms=4, color=COLOURS["jaxinfer"], label=label
        )
    panels[2].set_xlabel("requests a second, at random times")
    panels[2].set_ylabel("ms")
    panels[2].set_ylim(bottom=0)
    panels[2].legend(frameon=False, fontsize=7)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    _save(figure, path)


def _figure() -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plots need matplotlib; pip install -e '.[bench]'") from error
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    """In place in one step; without software versions, so equal data gives equal bytes."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=144, metadata={"Software": None})
