"""`jaxinfer eval TASK`: what a cache policy costs in quality, beside the full cache and a baseline
of the same bytes."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jaxinfer.cli import options as o
from jaxinfer.cli.eval_sparsity import METHODS, Asked, evaluate_sparsity, refuse_for
from jaxinfer.cli.notices import work_begins
from jaxinfer.cli.text_input import read_text
from jaxinfer.typing import Json

if TYPE_CHECKING:
    from jaxinfer.cache.policy import Policy
    from jaxinfer.eval.tables import Row
    from jaxinfer.eval.tasks import Measure, Settings
    from jaxinfer.lm import LM

TASKS = (
    "perplexity (of texts, through the cache), stream (one long text, as a curve), passkey (a "
    "number hidden in filler), lines (a number some lines back), recall (copies and pairs of "
    "random tokens; needs no tokenizer), rouge (continuations) or sparsity (methods of sparsity "
    "beside the dense model)."
)


def _count(help: str) -> object:
    return typer.Option(min=1, max=o.LARGEST, help=help)


def evaluate(
    task: Annotated[str, typer.Argument(help=TASKS)],
    model: Annotated[str | None, typer.Argument(help=o.DEFAULT_MODEL)] = None,
    policy: o.PolicyOption = "full",
    policy_args: o.PolicyArgsOption = "",
    baseline: Annotated[
        str | None,
        typer.Option(help="Row of equal memory: streaming, window, h2o or none."),
    ] = None,
    alone: Annotated[bool, typer.Option("--alone", help="Only the policy's row.")] = False,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text", help="A UTF-8 file to evaluate on; repeatable; - is standard input."
        ),
    ] = None,
    source: Annotated[
        str,
        typer.Option(
            help=f"Without --text: held-out texts of {o.SOURCES}, which "
            "tools/data/fetch_texts.py of a source checkout fetches."
        ),
    ] = "essays",
    documents: Annotated[int | None, _count("At most so many texts of the source.")] = None,
    context: Annotated[int | None, _count("perplexity: tokens of a block.")] = None,
    tokens: Annotated[
        int | None, _count("perplexity, sparsity: of each text; stream: in all (8192).")
    ] = None,
    every: Annotated[
        int | None, _count("stream: tokens per point (2048); lines: lines per query (10).")
    ] = None,
    repeat: Annotated[
        bool, typer.Option("--repeat", help="stream: start again where the texts end.")
    ] = False,
    recompute: Annotated[
        int | None, _count("stream: a row that reads the last so many tokens anew.")
    ] = None,
    stride: Annotated[int | None, _count("stream: tokens that --recompute moves by (1).")] = None,
    lengths: Annotated[
        str | None, typer.Option(help="passkey: prompt tokens; recall: tokens or pairs; as 64,256.")
    ] = None,
    depths: Annotated[
        str | None, typer.Option(help="passkey: from 0 (beginning) to 1 (end), as 0,0.5,1.")
    ] = None,
    samples: Annotated[int | None, _count("passkey: per cell (5); recall: rows (8).")] = None,
    scoring: Annotated[
        str | None, typer.Option(help="passkey, lines: rank (ten candidates) or greedy.")
    ] = None,
    lines: Annotated[int | None, _count("lines: lines of the stream (100).")] = None,
    distances: Annotated[
        str | None, typer.Option(help="lines: how many lines back, as 1,10,40.")
    ] = None,
    kind: Annotated[str | None, typer.Option(help="recall: copy or associative.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="rouge: full (that cache's continuation) or text.")
    ] = None,
    prompt_tokens: Annotated[
        int | None, _count("rouge, sparsity: tokens of each prompt (256, 64).")
    ] = None,
    new_tokens: Annotated[int | None, _count("rouge, sparsity: tokens to generate (64).")] = None,
    methods: Annotated[
        str | None, typer.Option(help=f"sparsity: of {METHODS}; deja_vu, lte or a folder of one.")
    ] = None,
    densities: Annotated[
        str | None, typer.Option(help="sparsity: shares above 0 and at most 1, as 0.75,0.5.")
    ] = None,
    block_size: Annotated[int | None, _count("sparsity: neurons of a block (1).")] = None,
    calibration: Annotated[
        int | None, _count("sparsity: training texts that baselines learn from (8).")
    ] = None,
    chunk: Annotated[int | None, _count("Tokens read at once; the policy has a default.")] = None,
    seed: o.SeedOption = 0,
    results: Annotated[
        Path | None, typer.Option(help="Folder to append a JSON Lines record to.")
    ] = None,
    dtype: o.DtypeOption = None,
    weights: o.WeightsOption = None,
    sparsity: o.SparsityOption = None,
    sparsity_args: o.SparsityArgsOption = "",
    as_json: o.JsonOption = False,
) -> None:
    """Measure what a cache policy costs in quality.

    Prints a row each for the full cache, the policy, and a baseline that keeps as many tokens as
    fit into the policy's bytes; with --sparsity all of the sparse model. Texts come from --text, or
    from those that `python tools/data/fetch_texts.py` of a source checkout has fetched.
    """
    chosen = o.make_policy(policy, policy_args)
    method = o.make_sparsity(sparsity, sparsity_args, model)
    own = {
        "methods": methods, "densities": _numbers("--densities", densities, float),
        "block_size": block_size, "calibration": calibration,
    }  # fmt: skip

    from jaxinfer.eval import tasks
    from jaxinfer.eval.tables import contenders, markdown, save

    settings = tasks.Settings(
        seed=seed, chunk=chunk, context=context, tokens=tokens, every=every,
        repeat=repeat or None, recompute=recompute, stride=stride,
        lengths=_numbers("--lengths", lengths, int), depths=_numbers("--depths", depths, float),
        samples=samples, scoring=scoring, lines=lines,
        distances=_numbers("--distances", distances, int), kind=kind, reference=reference,
        prompt_tokens=prompt_tokens, new_tokens=new_tokens,
    )  # fmt: skip
    texts = [read_text(path) for path in text or []]
    if task == "sparsity":
        others = {"policy": policy != "full", "sparsity": sparsity, "baseline": baseline}
        asked = Asked(settings, others, texts, source, documents, **own)
        return evaluate_sparsity(asked, model, dtype, weights, results, as_json)
    refuse_for(task, own)
    tasks.check_settings(task, settings)
    settings = tasks.with_texts(task, settings, texts, source, documents)

    from jaxinfer.cli.models import open_model

    lm = open_model(model, dtype, weights, sparsity=method)
    length, measure = tasks.prepare(task, lm, settings)
    if alone:
        rivals = {"policy": chosen}
    else:
        kind_of_rival = baseline or tasks.TASKS[task].baseline
        rivals = contenders(lm, chosen, length, None if kind_of_rival == "none" else kind_of_rival)
    work_begins()
    o.note_if_whole(chosen, length)
    rows = _measure(lm, rivals, length, measure)
    if recompute is not None:
        rows.append(_recompute(lm, settings))
    if results is not None:
        flags = f" --policy-args {policy_args}" if policy_args else ""
        flags += f" --sparsity {sparsity}" if sparsity else ""
        flags += f" --sparsity-args {sparsity_args}" if sparsity_args else ""
        command = f"jaxinfer eval {task} {lm.name} --policy {policy}{flags}"
        config = {"task": task, "model": lm.name, "policy": policy, "policy_args": policy_args}
        config |= {"sparsity": sparsity, "sparsity_args": sparsity_args} if sparsity else {}
        config |= {"length": length} | tasks.given(settings)
        save(task, config, rows, results, seed=seed, command=command)
    if as_json:
        common = {"task": task, "model": lm.name, "length": length}
        common |= {} if method is None else {"sparsity": method.name}
        for row in rows:
            o.print_json(common | _record(row))
        return
    print(markdown(rows))
    if task == "passkey":
        for row in rows:
            print(f"\n{row.label}: {row.policy}\n\n{_depth_table(row.details or ())}")


def _numbers(option: str, text: str | None, kind: type) -> tuple | None:
    if text is None:
        return None
    try:
        numbers = tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"{option} expects numbers such as 1,2,3, got {text!r}") from None
    if any(not 0 <= number <= o.LARGEST for number in numbers):
        raise ValueError(f"{option} expects numbers of 0 or more, got {text!r}")
    return numbers


def _measure(lm: "LM", rivals: "dict[str, Policy]", length: int, measure: "Measure") -> "list[Row]":
    from jaxinfer.eval.tables import compare
    from jaxinfer.progress import progress

    rows = []
    for label, rival in rivals.items():
        with progress(f"{label}: {rival.name}") as report:
            rows += compare(lm, {label: rival}, length, lambda one, r=report: measure(one, r))
    return rows


def _recompute(lm: "LM", settings: "Settings") -> "Row":
    from jaxinfer.eval.tasks import recompute_row
    from jaxinfer.progress import progress

    with progress("recompute") as report:
        return recompute_row(lm, settings, report)


def _record(row: "Row") -> Json:
    return row.to_dict() | ({} if row.details is None else {"details": row.details})


def _depth_table(cells: Sequence[Json]) -> str:
    """Accuracy, a row per depth and a column per length in tokens."""
    lengths = list(dict.fromkeys(cell["length"] for cell in cells))
    found = {(c["depth"], c["length"]): c["correct"] / c["samples"] for c in cells}
    lines = ["| depth | " + " | ".join(map(str, lengths)) + " |", "|---" * (len(lengths) + 1) + "|"]
    for depth in dict.fromkeys(cell["depth"] for cell in cells):
        row = " | ".join(f"{found[depth, length]:.2f}" for length in lengths)
        lines.append(f"| {depth:g} | {row} |")
    return "\n".join(lines)
