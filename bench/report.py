"""`bench/results/REPORT.md` and its plots from the records: the last one of every configuration.

Every table row states what was run, our median, the peer's median and the ratio with its range over
the rounds; below the tables stand command, device and versions of each record.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.harness import RESULTS
from jaxinfer.files import write_text
from jaxinfer.records import Record, latest, read_records

HEADER = """# Benchmark results

Medians of interleaved rounds; every peer runs alone in its own process, at its best thread count.
A ratio is ours divided by the peer's in the same round (median, range); above 1 we are faster.
"""


def report(folder: Path = RESULTS, *, plots: bool = False) -> str:
    """The report as Markdown, whose plots are drawn into the folder if asked for; ValueError when
    there is nothing to report."""
    records = latest(read_records(folder))
    if not records:
        raise ValueError(f"no results in {folder.name}/; run `python -m bench all` first")
    parts = [HEADER]
    for title, name, section in SECTIONS:
        chosen = [record for record in records if record.name == name]
        if chosen:
            parts.append(f"## {title}\n\n{section(chosen)}")
            plot = PLOTS.get(name)
            if plot is not None:
                if plots:
                    plot(chosen, folder / f"{name}.png")
                parts.append(f"![{title}]({name}.png)\n")
    parts.append("## Runs\n\n" + runs(records))
    return "\n".join(parts)


def write_report(folder: Path = RESULTS) -> Path:
    """Writes the report and its plots into the folder."""
    path = folder / "REPORT.md"
    write_text(path, report(folder, plots=True))
    return path


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def spread(summary: dict[str, Any], digits: int = 2) -> str:
    """Median with the range of the rounds."""
    return "{:.{d}f} ({:.{d}f}-{:.{d}f})".format(
        summary["median"], summary["min"], summary["max"], d=digits
    )


def decode_section(records: Sequence[Record]) -> str:
    rows, notes = [], []
    for record in sorted(records, key=lambda r: (r.config["model"], r.config["batch"])):
        config, metrics = record.config, record.metrics
        ours = metrics["jaxinfer"]
        for peer, ratios in metrics["ratios"].items():
            theirs = metrics[peer]
            rows.append(
                (
                    config["model"],
                    config["batch"],
                    peer_name(peer, metrics),
                    f"{ours['tokens_per_s']['median']:.1f}",
                    f"{theirs['tokens_per_s']['median']:.1f}",
                    f"{ours['ms_per_step']['median']:.1f}",
                    f"{theirs['ms_per_step']['median']:.1f}",
                    spread(ratios),
                )
            )
        label = f"{config['model']}, batch {config['batch']}"
        if "floor_ms" in metrics:
            notes.append(
                f"{label}: bandwidth floor {metrics['floor_ms']:.1f} ms per step "
                f"({metrics['step_mb']:.0f} MB at {metrics['read_gb_per_s']:.1f} GB/s), "
                f"share {metrics['floor_share']:.2f}."
            )
        if "gain_over_first_batch" in metrics:
            notes.append(f"{label}: {metrics['gain_over_first_batch']:.2f}x the rate of batch 1.")
        if "same_tokens_as_torch" in metrics:
            notes.append(f"{label}: {metrics['same_tokens_as_torch']:.0%} of tokens equal torch's.")
        notes += missing(label, metrics)
    columns = ("model", "batch", "peer", "ours, tokens/s", "peer, tokens/s")
    columns += ("ours, ms/step", "peer, ms/step", "ratio")
    explained = (
        "The ratio to dots-only is our share of the reachable floor: the same matrix products "
        "alone. llama.cpp computes with the 4-bit weights of its file.\n\n"
    )
    return explained + table(columns, rows) + "\n" + bullets(notes)


def prefill_section(records: Sequence[Record]) -> str:
    rows, notes = [], []
    for record in sorted(records, key=lambda r: (r.config["model"], r.config["tokens"])):
        config, metrics = record.config, record.metrics
        ours = metrics["jaxinfer"]["tokens_per_s"]["median"]
        for peer, ratios in metrics["ratios"].items():
            theirs = metrics[peer]["tokens_per_s"]["median"]
            rows.append(
                (
                    config["model"],
                    config["tokens"],
                    peer_name(peer, metrics),
                    f"{ours:.0f}",
                    f"{theirs:.0f}",
                    spread(ratios),
                )
            )
        notes += missing(config["model"], metrics)
    columns = ("model", "tokens", "peer", "ours, tokens/s", "peer, tokens/s", "ratio")
    return table(columns, rows) + "\n" + bullets(notes)


def context_section(records: Sequence[Record]) -> str:
    rows, notes = [], []
    for record in records:
        model, metrics = record.config["model"], record.metrics
        for point in metrics["points"]:
            rows.append(
                (
                    model,
                    point["context"],
                    point["capacity"],
                    spread(point["ms_per_token"], 1),
                    f"{point['floor_ms']:.1f}",
                )
            )
        if metrics["capacity_cost"] is not None:
            notes.append(
                f"{model}: time at the largest capacity over the smallest, same live context: "
                f"{metrics['capacity_cost']:.2f} (median over contexts)."
            )
    columns = ("model", "live context", "capacity", "ms/token", "bandwidth floor, ms")
    return table(columns, rows) + "\n" + bullets(notes)


def startup_section(records: Sequence[Record]) -> str:
    rows = []
    for record in records:
        model, metrics = record.config["model"], record.metrics
        rows += [
            (model, "cold start to first token", f"{metrics['cold']['seconds']:.2f}"),
            (model, "warm start to first token", spread(metrics["warm"]["seconds"])),
        ]
        labels = {
            "import_s": "of which imports",
            "load_s": "of which loading",
            "first_token_s": "of which first token",
        }
        rows += [(model, text, spread(metrics["warm"][key])) for key, text in labels.items()]
        rows.append((model, "import jaxinfer beyond jax", spread(metrics["import_beyond_jax_s"])))
    return table(("model", "what", "seconds"), rows)


def sparsity_section(records: Sequence[Record]) -> str:
    rows, notes = [], []
    order = lambda r: (r.config["model"], r.config.get("tree") or 0, r.config["batch"])  # noqa: E731
    for record in sorted(records, key=order):
        config, metrics = record.config, record.metrics
        for label, ratios in metrics["ratios"].items():
            ours, dense = (metrics[name]["ms_per_step"]["median"] for name in (label, "dense"))
            times = f"{ours:.2f}", f"{dense:.2f}", spread(ratios), metrics["lists"][label]
            model = " ".join(filter(None, [config["model"], config.get("weights")]))
            rows.append((model, _rows_of_step(config), label, *times))
        differ = [name for name, same in metrics["same_tokens_as_masked"].items() if not same]
        if differ:
            notes.append(f"{config['model']}: other tokens than masked: {', '.join(differ)}.")
    columns = ("model", "step", "sparsity", "ms/step", "dense, ms/step", "ratio")
    explained = (
        "The ratio is dense over sparse time of a step. Layers that list their blocks read only "
        "those that are used; the others take the dense products. Densities without a name are "
        "those of random routers: time without quality.\n\n"
    )
    return explained + table((*columns, "layers that list"), rows) + "\n" + bullets(notes)


def _rows_of_step(config: Mapping[str, Any]) -> str:
    tree = config.get("tree")
    return f"batch {config['batch']}" if tree is None else f"tree of {tree}"


def recurrence_section(records: Sequence[Record]) -> str:
    rows, notes = [], []
    for record in sorted(records, key=lambda r: (r.config["model"], r.config["batch"])):
        config, metrics = record.config, record.metrics
        for point in sorted(metrics["points"], key=lambda p: p["prompt"]):
            rows.append(
                (
                    config["model"],
                    config["batch"],
                    point["prompt"],
                    point["form"],
                    spread(point["ms_per_step"]),
                    f"{point['tokens_per_s']['median']:.0f}",
                    f"{point['cache_bytes'] / 1e6:.2f}",
                )
            )
        label = f"{config['model']}, batch {config['batch']}"
        if metrics["flat"] is not None:
            notes.append(
                f"{label}: a step by modes behind the longest prompt takes {metrics['flat']:.2f} "
                "times one behind the shortest."
            )
        for what, key in (("time", "crossover_prompt"), ("bytes", "crossover_bytes")):
            if metrics[key] is not None:
                notes.append(f"{label}: from prompts of {metrics[key]} modes take less {what}.")
    columns = ("model", "batch", "prompt", "form", "ms/step", "tokens/s", "MB a row")
    explained = (
        "Long convolutions by modes and exactly, beside the model that they stand next to with a "
        "full and a 2-bit cache. Filters are random: time and memory without quality.\n\n"
    )
    return explained + table(columns, rows) + "\n" + bullets(notes)


def serving_section(records: Sequence[Record]) -> str:
    rows, notes = [], []
    for record in sorted(records, key=lambda r: (r.config["model"], r.config.get("clients", 0))):
        config, metrics = record.config, record.metrics
        label = f"{config['model']}, {config['loop']}"
        if config["loop"] == "closed":
            rows += [
                (config["model"], config["clients"], name, *_times(one), _against(metrics, name))
                for name, one in metrics.items()
                if isinstance(one, dict) and "tokens_per_s" in one
            ]
        elif config["loop"] == "open":
            ours = metrics["jaxinfer"]
            notes.append(
                f"{label} loop, {metrics['rate']:.2f} requests a second ({config['share']:.0%} of "
                f"the closed loop's rate): first token after {ours['first_p50_ms']:.0f} ms, 95 % "
                f"within {ours['first_p95_ms']:.0f} ms; between pieces {ours['between_p50_ms']:.0f}"
                f" and {ours['between_p95_ms']:.0f} ms."
            )
        else:
            notes.append(
                f"{label} of {metrics['prompt_tokens']:.0f} tokens: {metrics['read_share']:.1%} of "
                f"them are read, and the first token comes {metrics['sooner']:.1f} times sooner "
                "than behind prompts with nothing in common."
            )
        notes += missing(label, metrics)
    columns = ("model", "clients", "server", "tokens/s", "first token, ms (p50)", "p95")
    columns += ("between pieces, ms (p50)", "p95", "ratio")
    explained = (
        "The ratio is our rate over that row's: float32 against transformers and `lm.generate` "
        "with all prompts at once, int8 against llama.cpp's 4-bit file.\n\n"
    )
    return explained + table(columns, rows) + "\n" + bullets(notes)


def _times(one: dict[str, Any]) -> list[str]:
    keys = ("first_p50_ms", "first_p95_ms", "between_p50_ms", "between_p95_ms")
    times = [f"{one[key]['median']:.0f}" if key in one else "" for key in keys]
    return [f"{one['tokens_per_s']['median']:.1f}", *times]


def _against(metrics: dict[str, Any], name: str) -> str:
    return spread(metrics["ratios"][name]) if name in metrics["ratios"] else ""


def peer_name(peer: str, metrics: dict[str, Any]) -> str:
    threads = metrics.get("peer_facts", {}).get(peer, {}).get("threads")
    return peer if threads is None else f"{peer}, {threads} thread{'s' * (threads > 1)}"


def missing(label: str, metrics: dict[str, Any]) -> list[str]:
    return [f"{label}: no {peer}: {why}." for peer, why in metrics["missing"].items()]


def bullets(notes: Sequence[str]) -> str:
    return "".join(f"- {note}\n" for note in dict.fromkeys(notes))


def runs(records: Sequence[Record]) -> str:
    """One line for each distinct command and environment."""
    lines = []
    for record in records:
        env = dict(record.env)
        head = ", ".join(str(env.pop(key)) for key in ("device", "cpu") if env.get(key))
        versions = ", ".join(f"{key} {value}" for key, value in env.items() if value is not None)
        lines.append(f"`{record.command}` at {record.time}: {head}; {versions}.")
    return bullets(lines)


def headline(record: Record) -> str:
    """One line for a terminal."""
    metrics = record.metrics
    if record.name == "startup":
        text = (
            f"warm {metrics['warm']['seconds']['median']:.2f} s, "
            f"cold {metrics['cold']['seconds']:.2f} s to first token; "
            f"import {metrics['import_beyond_jax_s']['median']:.2f} s beyond jax"
        )
    elif record.name == "context-scaling":
        points = [
            f"{p['context']}/{p['capacity']}: {p['ms_per_token']['median']:.1f} ms"
            for p in metrics["points"]
        ]
        text = "; ".join(points)
    elif record.name == "sparsity":
        ratios = [f"{name} {r['median']:.2f}x" for name, r in metrics["ratios"].items()]
        text = f"{_rows_of_step(record.config)}: dense over sparse {', '.join(ratios)}"
    elif record.name == "recurrence":
        last = max(point["prompt"] for point in metrics["points"])
        times = [
            f"{p['form']} {p['ms_per_step']['median']:.2f} ms"
            for p in metrics["points"]
            if p["prompt"] == last
        ]
        text = f"batch {record.config['batch']}, prompt {last}: {', '.join(times)}"
    elif record.name == "serving":
        text = _served(record)
    else:
        ratios = [f"{name} {r['median']:.2f}x" for name, r in metrics["ratios"].items()]
        rate = metrics["jaxinfer"]["tokens_per_s"]["median"]
        batch = f"batch {record.config['batch']}: " if "batch" in record.config else ""
        text = f"{batch}{rate:.1f} tokens/s; against {', '.join(ratios)}"
    return f"{record.name} {record.config['model']}: {text}"


def _served(record: Record) -> str:
    config, metrics = record.config, record.metrics
    if config["loop"] == "shared prompt":
        return f"shared prompt: first token {metrics['sooner']:.1f} times sooner"
    ours = metrics["jaxinfer"]
    if config["loop"] == "open":
        return f"{metrics['rate']:.2f} requests/s: first token {ours['first_p50_ms']:.0f} ms"
    ratios = [f"{name} {r['median']:.2f}x" for name, r in metrics["ratios"].items()]
    rate = ours["tokens_per_s"]["median"]
    return f"{config['clients']} clients: {rate:.1f} tokens/s; against {', '.join(ratios)}"


def _plot_context(records: Sequence[Record], path: Path) -> None:
    from bench.plots import context_scaling

    context_scaling(records, path)


def _plot_decode(records: Sequence[Record], path: Path) -> None:
    from bench.plots import decode

    decode(records, path)


def _plot_serving(records: Sequence[Record], path: Path) -> None:
    from bench.plots import serving

    serving(records, path)


SECTIONS = (
    ("Decode", "decode", decode_section),
    ("Prefill", "prefill", prefill_section),
    ("Context scaling", "context-scaling", context_section),
    ("Start-up", "startup", startup_section),
    ("Sparse blocks", "sparsity", sparsity_section),
    ("Recurrences", "recurrence", recurrence_section),
    ("Serving", "serving", serving_section),
)
PLOTS = {"decode": _plot_decode, "context-scaling": _plot_context, "serving": _plot_serving}


if __name__ == "__main__":
    print(write_report())
