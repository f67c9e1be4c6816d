"""`suite.md` and its plots from the last row of every step."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.gpu.rows import NAME, NO_TIME, identity
from bench.plots import _figure, _save
from bench.report import table
from jaxinfer.files import write_text
from jaxinfer.records import Record, latest, read_records

SHAPE = ("part", "op", "peer")


def write_summary(folder: Path) -> Path:
    """Writes the summary in one step; plots where there is something to plot and matplotlib is."""
    rows = latest([row for row in read_records(folder) if row.name == NAME])
    parts = ["# GPU suite\n", machine(rows), checks(rows), kernels(rows), decode(rows)]
    for name, plot in (("attention", plot_attention), ("speedups", plot_speedups)):
        try:
            if plot(rows, folder / f"suite-{name}.png"):
                parts.append(f"![{name}](suite-{name}.png)\n")
        except ValueError as error:
            parts.append(f"No plot: {error}\n")
    parts.append(unmeasured(rows))
    path = folder / f"{NAME}.md"
    write_text(path, "\n".join(part for part in parts if part))
    return path


def machine(rows: Sequence[Record]) -> str:
    lines = []
    if any(row.metrics.get("meaningless_times") for row in rows):
        lines.append("**Tiny shapes or interpreted kernels: the times mean nothing.**")
    for row in rows:
        if row.config["part"] == "environment" and "copy_gb_per_s" in row.metrics:
            m = row.metrics
            versions = ", ".join(
                f"{name} {row.env.get(name)}" for name in ("jax", "torch", "commit")
            )
            lines.append(
                f"{m['device']} ({m['smi']}): copies at {m['copy_gb_per_s']:.0f} GB/s, reads at "
                f"{m['read_gb_per_s']:.0f}; {versions}; `{row.command}` at {row.time}."
            )
    return "\n\n".join(lines) + "\n"


def checks(rows: Sequence[Record]) -> str:
    found = [row for row in rows if "agrees" in row.metrics]
    lines = []
    for op in dict.fromkeys(row.config["op"] for row in found):
        own = [row.metrics for row in found if row.config["op"] == op]
        worst = max(_share(m["largest_error"], m["tolerance"]) for m in own)
        lines.append((op, f"{sum(m['agrees'] for m in own)} of {len(own)}", f"{worst:.2f}"))
    columns = ("kernel", "checks that agree", "largest error / tolerance")
    return "## Correctness\n\n" + table(columns, lines) if lines else ""


def _share(error: float | None, tolerance: float) -> float:
    """What an error uses of its tolerance. None is an error that was not finite; a kernel that only
    copies has a tolerance of 0."""
    if error is None:
        return math.inf
    return error / tolerance if tolerance else (math.inf if error else 0.0)


def kernels(rows: Sequence[Record]) -> str:
    lines = []
    for row, peers in with_peers(rows):
        m, ratios = row.metrics, []
        for peer in peers:
            ratios.append(f"{peer.config['peer']} {peer.metrics['us'] / m['us']:.2f}x")
        share = m["share_of_copy"]
        lines.append(
            (row.config["op"], shape_of(row), f"{m['us']:.1f}", f"{m['gb_per_s']:.0f}",
             "" if share is None else f"{share:.2f}", ", ".join(ratios))
        )  # fmt: skip
    columns = ("kernel", "shape", "us", "GB/s", "share of copy", "faster than")
    return "## Kernels\n\n" + table(columns, lines) if lines else ""


def decode(rows: Sequence[Record]) -> str:
    lines, notes = [], []
    for row in rows:
        c, m = row.config, row.metrics
        if c["part"] == "decode" and "ms_per_token" in m:
            floor = ["" if m[x] is None else f"{m[x]:.2f}" for x in ("floor_ms", "floor_share")]
            lines.append(
                (c["model"], c.get("weights", "bfloat16"), c["policy"], c["peer"], c["context"],
                 c["batch"], f"{m['ms_per_token']:.2f}", f"{m['tokens_per_s']:.0f}", *floor)
            )  # fmt: skip
        if c.get("op") == "largest batch" and "error" not in m:
            sizes = [f"{k.split(':')[0]} {v}" for k, v in m.items() if k.endswith("largest batch")]
            notes.append(
                f"- {c['model']}: largest batch at {m.get('context')}: {', '.join(sizes)}\n"
            )
    names = "model, weights, policy, attention, context, batch, ms/token, tokens/s, floor in ms"
    columns = (*names.split(", "), "share of floor")
    if not lines:
        return "".join(notes)
    return "## Decode\n\n" + table(columns, lines) + "\n" + "".join(notes)


def unmeasured(rows: Sequence[Record]) -> str:
    lines, late = [], Counter()
    for row in rows:
        why = row.metrics.get("error") or row.metrics.get("skipped")
        if why == NO_TIME["skipped"]:
            late[row.config["part"]] += 1
        elif why:
            lines.append(f"- {identity(row.config)}: {why}\n")
    lines += [
        f"- {count} more steps of {part}: {NO_TIME['skipped']}\n" for part, count in late.items()
    ]
    return "## Not measured\n\n" + "".join(lines) if lines else ""


def with_peers(rows: Sequence[Record]) -> list[tuple[Record, list[Record]]]:
    """Every timed kernel with the peers of the same operation and shape.

    The dense block of XLA is the peer of every density, a bfloat16 product that of every width.
    """
    timed = [row for row in rows if "us" in row.metrics]
    peers = [row for row in timed if row.config["peer"] != "kernel"]
    found = []
    for row in timed:
        if row.config["peer"] == "kernel":
            own = [p for p in peers if _matches(row.config, p.config)]
            found.append((row, own))
    return found


def _matches(ours: dict[str, Any], peer: dict[str, Any]) -> bool:
    ignored = {"part", "peer"}
    if peer["peer"].startswith("xla"):
        ignored |= {"density", "op"}
        if ours["op"].split()[0] != peer["op"].split()[0]:
            return False
    return all(ours.get(k) == v for k, v in peer.items() if k not in ignored)


def shape_of(row: Record) -> str:
    return ", ".join(
        f"{name} {json.dumps(x) if isinstance(x, list) else x}"
        for name, x in row.config.items()
        if name not in SHAPE
    )


def plot_attention(rows: Sequence[Record], path: Path) -> bool:
    """Share of the copy's rate against the number of slots, a line per kernel, model and batch."""
    lines: dict[tuple, list[tuple[int, float]]] = {}
    for row, _ in with_peers(rows):
        c, share = row.config, row.metrics["share_of_copy"]
        if c["part"] == "attention" and share is not None and c["batch"] <= 8:
            key = (c["op"], c["model"], c["batch"])
            lines.setdefault(key, []).append((c["slots"], share))
    if not lines:
        return False
    figure, axes = _figure()
    colours = {op: f"C{i}" for i, op in enumerate(dict.fromkeys(key[0] for key in lines))}
    styles = dict(
        zip(dict.fromkeys(key[1:] for key in lines), ("-o", "--s", ":^", "-.d"), strict=False)
    )
    for (op, *rest), points in lines.items():
        points = sorted(points)
        style = styles.get(tuple(rest), "-")
        label = f"{op}, {rest[0]}, batch {rest[1]}"
        axes.plot(*zip(*points, strict=True), style, color=colours[op], label=label)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("stored tokens")
    axes.set_ylabel("share of a copy's bandwidth")
    axes.set_title("Attention of one token")
    figure.set_figwidth(10)
    figure.legend(frameon=False, fontsize=7, loc="outside right center")
    _save(figure, path)
    return True


def plot_speedups(rows: Sequence[Record], path: Path) -> bool:
    """How many times longer each peer takes: a dot for every shape."""
    dots: dict[str, list[float]] = {}
    for row, peers in with_peers(rows):
        for peer in peers:
            label = f"{row.config['op']} / {peer.config['peer']}"
            dots.setdefault(label, []).append(peer.metrics["us"] / row.metrics["us"])
    if not dots:
        return False
    figure, axes = _figure()
    figure.set_figheight(1 + 0.25 * len(dots))
    for i, (_, ratios) in enumerate(sorted(dots.items())):
        axes.plot(ratios, [i] * len(ratios), "o", alpha=0.6, color="#1b6ca8")
    axes.set_yticks(range(len(dots)), sorted(dots), fontsize=7)
    axes.axvline(1, color="#9aa5b1")
    axes.set_xscale("log")
    axes.set_xlabel("time of the peer / time of the kernel")
    _save(figure, path)
    return True
