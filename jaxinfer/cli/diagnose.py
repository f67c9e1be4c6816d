"""`jaxinfer diagnose`: which cache policy each layer should have within a budget of bytes."""

import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jaxinfer.cli import options as o
from jaxinfer.cli.notices import note
from jaxinfer.files import quoted

if TYPE_CHECKING:
    import numpy as np

    from jaxinfer.lm import LM
    from jaxinfer.theory.diagnose import Candidate, Diagnosis

CANDIDATES = (
    "Policies to choose from, NAME or NAME:key=value:..., with commas between: "
    "kivi2:residual=32,streaming:window=60,full. Without arguments they are sized for the window; "
    "left out: kivi2,kivi4,streaming,h2o,less,full, as far as they suit the model."
)
BY = (
    "What predicts a layer's loss: output (what attention adds), r_rho or l2 (keys and values), "
    "entropy, sink, rank (of attention), measured (the model's loss; slow)."
)


def diagnose(
    model: Annotated[str, typer.Argument(help=o.MODELS)],
    text: Annotated[
        str,
        typer.Option("--text", metavar="FILE", help="What the model reads; - is standard input."),
    ],
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            metavar="BYTES|SHARE",
            help="Of the cache of one text of --window tokens: bytes, or a share of the full one "
            "such as 0.3.",
        ),
    ] = None,
    candidates: Annotated[
        str | None, typer.Option("--candidates", metavar="NAME,...", help=CANDIDATES)
    ] = None,
    by: Annotated[str, typer.Option("--by", help=BY)] = "output",
    save: Annotated[
        Path | None,
        typer.Option("--save", metavar="POLICY.json", help="File for --policy and ji.per_layer."),
    ] = None,
    window: Annotated[
        int, typer.Option("--window", min=16, max=32767, help="Tokens of a text.")
    ] = 512,
    windows: Annotated[
        int, typer.Option("--windows", min=1, max=4096, help="Of the text, spread over it.")
    ] = 8,
    points: Annotated[
        int, typer.Option("--points", min=8, max=8192, help="Tokens between which R_rho is taken.")
    ] = 512,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            "--run-dir",
            help="Working folder, from which a killed run goes on; default: in the cache folder.",
        ),
    ] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            "--calibration",
            metavar="FILE",
            help="Instead: say how far this text is from --text in the model's eyes; repeatable, "
            "the nearest is the one to calibrate or train on.",
        ),
    ] = None,
    force: o.ForceOption = False,
    as_json: o.JsonOption = False,
) -> None:
    """Choose a cache policy for every layer, by what compression does there.

    Each layer reads the text through each candidate's own cache. The choice with the least
    predicted loss within the budget is exact; another --budget or --by measures nothing again.

    Example: jaxinfer diagnose tiny-llama --text essay.txt --budget 0.3 --save policy.json

    Example: jaxinfer diagnose tiny-llama --text mail.txt --calibration a.txt --calibration b.txt
    """
    from jaxinfer.arguments import one_of
    from jaxinfer.cache.policy_file import is_policy_file
    from jaxinfer.cli.models import open_model
    from jaxinfer.cli.text_input import read_text
    from jaxinfer.eval.memory import policy_bytes
    from jaxinfer.files import check_new_file
    from jaxinfer.progress import bars
    from jaxinfer.theory.diagnose import SCORES, allocate, candidates_for
    from jaxinfer.theory.diagnose import diagnose as measure
    from jaxinfer.theory.diagnose.allocate import check_budget
    from jaxinfer.theory.diagnose.diagnosis import sizes_of
    from jaxinfer.theory.windows import spread_windows

    one_of("--by", by, SCORES)
    if calibration:
        if budget is not None or save is not None:
            raise ValueError("--calibration goes without --budget and --save; run it by itself")
        return _show_nearest(model, text, calibration, window, windows, points, as_json)
    if budget is None:
        raise ValueError("give --budget, or texts to compare with --calibration FILE")
    wanted_bytes = _budget(budget)
    if save is not None:
        if not is_policy_file(save.name):
            raise ValueError(
                f"--save must end in .json, as --policy knows a file by it; got {save}"
            )
        check_new_file(save, overwrite=force)
    words = read_text(text)
    lm = open_model(model)
    tokens = spread_windows(lm.encode(words), window, windows)
    names = None if candidates is None else [name for name in candidates.split(",") if name.strip()]
    chosen_from, left_out = candidates_for(lm, names, window)
    for line in left_out:
        note(f"note: {line}")
    for one in chosen_from:
        if one.written["name"] != "full":
            o.note_if_whole(one.policy, window)
    whole = policy_bytes(lm, "full", window)
    allowed = wanted_bytes if isinstance(wanted_bytes, int) else int(wanted_bytes * whole)
    check_budget(sizes_of(lm, chosen_from, window), allowed)  # before minutes of work
    folder = _run_folder(lm, tokens, chosen_from, points) if run_dir is None else run_dir
    with bars(transient=False) as report:
        found = measure(
            lm, tokens, chosen_from, folder, points=points, measured=by == "measured",
            report=report,
        )  # fmt: skip
    losses = found.losses(by)
    choice = allocate(losses, found.sizes, allowed)
    record = _record(found, losses, choice, by, allowed, whole, lm.name)
    if save is not None:
        _save(save, found, choice, record)
    if as_json:
        return o.print_json(record | {"errors": {k: x.tolist() for k, x in found.errors.items()}})
    _show(found, losses, choice, record)
    if save is not None:
        note(f"wrote {save}; use it with --policy {save}")


def _show_nearest(
    model: str, text: str, others: list[str], window: int, windows: int, points: int, as_json: bool
) -> None:
    """Which of some texts is the nearest."""
    import dataclasses

    from jaxinfer.cli.models import open_model
    from jaxinfer.cli.text_input import read_text
    from jaxinfer.theory.diagnose import nearest_texts
    from jaxinfer.theory.windows import spread_windows

    if len(set(others)) < len(others):
        raise ValueError("a text is given to --calibration twice; give each once")
    words = {name: read_text(name) for name in [text, *others]}
    lm = open_model(model)
    tokens = {name: spread_windows(lm.encode(x), window, windows) for name, x in words.items()}
    points = min(points, *(x.size // 2 for x in tokens.values()))
    found = nearest_texts(lm, tokens[text], {name: tokens[name] for name in others}, points=points)
    if as_json:
        ranked = [dataclasses.asdict(one) for one in found]
        return o.print_json({"model": lm.name, "points": points, "nearest": ranked})
    for one in found:
        print(f"{one.value:8.4f}  p {one.p_value:.3g}  {one.name}")
    note("debiased R_rho over the text's own spread, the nearest first; about 0: of one kind")


def _budget(text: str) -> int | float:
    """Whole bytes, or a share in (0, 1]."""
    try:
        found = int(text) if text.strip().isdecimal() else float(text)
    except (ValueError, OverflowError):
        found = 0
    if not 0 < found < 2**63 or (isinstance(found, float) and found > 1):
        raise ValueError(
            f"--budget must be whole bytes, or a share of the full cache above 0 and at most 1 "
            f"such as 0.3; got {quoted(text)}"
        )
    return found


def _run_folder(lm: "LM", tokens: "np.ndarray", candidates: "list[Candidate]", points: int) -> Path:
    """Of this model, text and candidates, so that the next run finds what is measured."""
    from jaxinfer.files import cache_folder
    from jaxinfer.theory.diagnose.diagnosis import RHO, options_of

    options = options_of(lm, tokens, candidates, points, RHO)
    return cache_folder() / "diagnose" / f"{zlib.crc32(repr(options).encode()):08x}"


def _record(
    found: "Diagnosis", losses: "np.ndarray", choice: "np.ndarray", by: str, budget: int,
    whole: int, model: str,
) -> dict[str, object]:  # fmt: skip
    layers = range(len(choice))
    measures = {
        name: found.measures[name].mean(axis=1).tolist()
        for name in ("relative_entropy", "sink_mass", "top_mass", "effective_rank.qk")
    }
    return {
        "model": model, "by": by, "length": found.length, "budget": budget, "full_bytes": whole,
        "bytes": sum(int(found.sizes[layer, choice[layer]]) for layer in layers),
        "predicted": sum(float(losses[layer, choice[layer]]) for layer in layers),
        "candidates": [one.name for one in found.candidates],
        "policies": [found.candidates[c].name for c in choice],
        "losses": losses.tolist(), "sizes": found.sizes.tolist(), "measures": measures,
    }  # fmt: skip


def _save(path: Path, found: "Diagnosis", choice: "np.ndarray", record: dict[str, object]) -> None:
    from jaxinfer.cache.policy_file import write_policy_file

    about = {key: record[key] for key in ("model", "by", "length", "budget", "bytes", "full_bytes")}
    write_policy_file(path, [found.candidates[c].written for c in choice], {"diagnosis": about})


def _show(
    found: "Diagnosis", losses: "np.ndarray", choice: "np.ndarray", record: dict[str, object]
) -> None:
    from rich.console import Console
    from rich.table import Table

    names = [one.name for one in found.candidates]
    table = Table("layer", "policy", "bytes", *names, title=f"predicted loss by {record['by']}")
    for layer, chosen in enumerate(choice):
        numbers = [f"{x:.2g}" for x in losses[layer]]
        name, size = found.candidates[chosen].name, found.sizes[layer, chosen]
        table.add_row(str(layer), name, f"{size:,}", *numbers)
    console = Console()
    console.print(table)
    share = int(record["bytes"]) / int(record["full_bytes"])  # type: ignore[call-overload]
    console.print(
        f"{record['bytes']:,} bytes for {found.length} tokens, {share:.1%} of the full cache; "
        f"predicted loss {record['predicted']:.4g} ({record['by']})"
    )
