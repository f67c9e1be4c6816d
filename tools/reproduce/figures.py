"""What the `reproduce_*` commands share: held-out rows of tokens, paired statistics, and the three
files of a figure (JSON Lines, Markdown, PNG) under `bench/results/`.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from jaxinfer.cache.policy import Policy
from jaxinfer.environment import environment
from jaxinfer.eval.documents import held_out_texts
from jaxinfer.eval.reader import Reader
from jaxinfer.eval.tables import Row, markdown, markdown_table, save
from jaxinfer.files import replacing, write_text
from jaxinfer.records import Record, append
from jaxinfer.typing import Json

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
DRAWS = 2000


def held_out_rows(lm: Any, rows: int, tokens: int, sources: Sequence[str]) -> np.ndarray:
    """i32[rows, tokens]: the beginnings of held-out documents that are long enough, in turn from
    every source."""
    queues = [iter(held_out_texts(source)) for source in sources]
    found: list[list[int]] = []
    while queues and len(found) < rows:
        for queue in list(queues):
            text = next(queue, None)
            if text is None:
                queues.remove(queue)
                continue
            row = lm.encode(text[: 12 * tokens])[:tokens]
            if len(row) == tokens and len(found) < rows:
                found.append(row)
    if len(found) < rows:
        raise ValueError(
            f"only {len(found)} held-out documents of {', '.join(sources)} have {tokens} tokens; "
            "ask for fewer rows or shorter ones, or fetch more texts (tools/data/fetch_texts.py)"
        )
    return np.asarray(found, np.int32)


def read_rows(
    lm: Any, policy: Policy, tokens: np.ndarray, chunk: int | None = None
) -> tuple[np.ndarray, int]:
    """log p f32[B, T-1] of every row read side by side through the policy's cache, and the cache
    bytes of one row."""
    reader = Reader(lm, policy, tokens.shape[1], rows=len(tokens), chunk=chunk)
    log_probs = reader.read(tokens).log_probs
    return log_probs, reader.cache_bytes // len(tokens)


def bootstrap(statistic: Callable[[np.ndarray], float], rows: int, seed: int = 0) -> list[float]:
    """The 95 % interval of `statistic(picked rows)` when the rows are drawn anew."""
    rng = np.random.default_rng(seed)
    draws = [statistic(rng.integers(0, rows, rows)) for _ in range(DRAWS)]
    return [float(x) for x in np.quantile(draws, [0.025, 0.975])]


def publish(
    name: str,
    title: str,
    config: Mapping[str, Any],
    rows: Sequence[Row],
    plot: Callable[[Any], None],
    *,
    seed: int,
    command: str,
    folder: Path = RESULTS,
    size: tuple[float, float] = (7.0, 4.2),
) -> None:
    """Writes the record, the table and the plot of policies; `plot` gets the axes."""
    save(name, config, rows, folder, seed=seed, command=command)
    _show(name, title, f"`{command}`\n\n{markdown(rows)}", plot, folder, size)


def publish_records(
    name: str,
    title: str,
    config: Mapping[str, Any],
    records: Sequence[Json],
    plot: Callable[[Any], None],
    *,
    caveat: str | None = None,
    seed: int,
    command: str,
    folder: Path = RESULTS,
    size: tuple[float, float] = (7.0, 4.2),
) -> None:
    """The same for rows that are of no policy, with what a reader must know beside them. What a row
    has as "details" is in the record, but not in the table."""
    metrics = {"rows": list(records)}
    record = Record(
        name=f"eval-{name}", config=dict(config), metrics=metrics, env=environment(),
        command=command, seed=seed,
    )  # fmt: skip
    append(record, folder)
    table = [{key: x for key, x in one.items() if key != "details"} for one in records]
    parts = (f"`{command}`", markdown_table(table), caveat)
    _show(name, title, "\n\n".join(x for x in parts if x is not None), plot, folder, size)


def _show(
    name: str,
    title: str,
    text: str,
    plot: Callable[[Any], None],
    folder: Path,
    size: tuple[float, float],
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    write_text(folder / f"{name}.md", f"# {title}\n\n{text}\n\n![{title}]({name}.png)\n")
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    plot(axes)
    axes.set_title(title, fontsize=10)
    with replacing(folder / f"{name}.png") as temporary:
        figure.savefig(temporary, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
    print(f"{title}\n\n{text}\n\nwrote {name}.md, {name}.png and eval-{name}.jsonl")
