"""`jaxinfer eval sparsity MODEL`: what methods of sparsity cost in quality, density by density."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from jaxinfer.cli import options as o
from jaxinfer.cli.notices import work_begins
from jaxinfer.typing import Json

if TYPE_CHECKING:
    from jaxinfer.eval.sparsity import Tasks
    from jaxinfer.eval.tasks import Settings
    from jaxinfer.lm import LM
    from jaxinfer.sparsity.calibration import Calibration

METHODS = "oracle, random, static, cats, teal, wina, griffin, moefication-oracle, moefication"
OPTIONS = ("tokens", "prompt_tokens", "new_tokens")
SHOWN = (
    "method", "density", "used", "layer_products", "layer_bytes", "perplexity", "low", "high",
    "relative", "copied", "agreement", "rougeL",
)  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """What the command line asked for; None takes the default. Of the `settings` all tasks share,
    this one has tokens, prompt_tokens, new_tokens and seed."""

    settings: "Settings"
    others: Json  # what was given of other tasks' options
    texts: Sequence[str]
    source: str
    documents: int | None
    methods: str | None
    densities: tuple[float, ...] | None
    block_size: int | None
    calibration: int | None


def refuse_for(task: str, options: Json) -> None:
    """Refuses options of this task that another would ignore."""
    for name, value in options.items():
        if value is not None:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} is an option of sparsity, not of {task}; leave it out")


def evaluate_sparsity(
    asked: Asked,
    model: str | None,
    dtype: str | None,
    weights: str | None,
    results: Path | None,
    as_json: bool,
) -> None:
    """Prints a row for the dense model and one per method and density."""
    from jaxinfer.cli.models import open_model
    from jaxinfer.eval.documents import document_rows, held_out_texts
    from jaxinfer.eval.sparsity import evaluate
    from jaxinfer.eval.sparsity_methods import DENSITIES, check_methods, methods_at, needs_text
    from jaxinfer.eval.tables import markdown_table
    from jaxinfer.io.model_index import DEFAULT
    from jaxinfer.progress import progress
    from jaxinfer.sparsity.baselines import units_at

    _check(asked)
    names = [name.strip() for name in (asked.methods or METHODS).split(",") if name.strip()]
    densities = asked.densities or DENSITIES
    check_methods(names, densities, DEFAULT if model is None else Path(model).name)
    texts = asked.texts or held_out_texts(asked.source)
    lm = open_model(model, dtype, weights)
    units_at(lm.config.intermediate_size, 1.0, asked.block_size or 1)
    tokens = asked.settings.tokens or min(512, lm.config.max_positions)
    rows = document_rows(lm, texts, asked.documents or 8, tokens + 1)
    calibration = _calibration(lm, asked, tokens) if needs_text(names) else None
    methods = methods_at(
        names, densities, block_size=asked.block_size or 1, calibration=calibration, model=lm.name
    )
    work_begins()
    with progress("methods") as report:
        found = evaluate(lm, methods, rows, tasks=_tasks(asked, tokens), report=report)
    common: Json = {"task": "sparsity", "model": lm.name, "weights": weights}
    if results is not None:
        _save(common, asked, names, densities, rows.shape, found, results)
    if as_json:
        for row in found:
            o.print_json(common | row)
        return
    columns = [name for name in SHOWN if any(name in row for row in found)]
    print(markdown_table([{name: row.get(name) for name in columns} for row in found]))


def _calibration(lm: "LM", asked: Asked, tokens: int) -> "Calibration":
    """The training texts that methods without training learn from."""
    from jaxinfer.sparsity.calibration import Calibration
    from jaxinfer.train.windows import text_windows

    count, context = asked.calibration or 8, min(tokens, 256)
    windows = text_windows(lambda text: lm.encode(text), count, context, seed=asked.settings.seed)
    return Calibration(lm.config, lm.params, windows)


def _tasks(asked: Asked, tokens: int) -> "Tasks":
    from jaxinfer.eval.sparsity import Tasks

    sizes = Tasks(prompt_tokens=min(Tasks.prompt_tokens, tokens // 2))
    return replace(sizes, **asked.settings.given("prompt_tokens", "new_tokens"))


def _check(asked: Asked) -> None:
    """Refuses what only other tasks have."""
    ignored = {f.name for f in fields(asked.settings)} - {"texts", "seed", *OPTIONS}
    for name in sorted({*filter(asked.others.get, asked.others), *asked.settings.given(*ignored)}):
        flag = "--" + name.replace("_", "-")
        raise ValueError(f"{flag} is not an option of sparsity; leave it out")


def _save(
    common: Json,
    asked: Asked,
    names: Sequence[str],
    densities: Sequence[float],
    shape: Sequence[int],
    found: Sequence[Json],
    folder: Path,
) -> None:
    from jaxinfer.environment import environment
    from jaxinfer.records import Record, append

    config = common | {
        "methods": list(names), "densities": list(densities), "block_size": asked.block_size or 1,
        "documents": shape[0], "tokens": shape[1] - 1,
    }  # fmt: skip
    command = f"jaxinfer eval sparsity {common['model']} --methods {','.join(names)} --densities "
    command += ",".join(f"{density:g}" for density in densities)
    append(
        Record(
            name="eval-sparsity", config=config, metrics={"rows": list(found)}, env=environment(),
            command=command, seed=asked.settings.seed,
        ),
        folder,
    )  # fmt: skip
