"""What the figures of sparsity share: a model, its held-out documents, the methods under
comparison, and their rows of a table.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from tools.reproduce.figures import held_out_rows

LISTS = ("used_per_layer", "heads_per_layer", "recall_per_layer", "mass_per_layer")


class Study:
    """A model, its held-out documents, and the methods under comparison."""

    def __init__(
        self, model: str, methods: str, densities: str, block_size: int, rows: int, tokens: int,
        calibration: int, sources: str,
    ):  # fmt: skip
        import jaxinfer as ji
        from jaxinfer.eval.sparsity_methods import methods_at, needs_text
        from jaxinfer.sparsity.calibration import Calibration
        from jaxinfer.train.windows import text_windows

        self.lm = ji.load(model, dtype="float32")
        self.rows = held_out_rows(self.lm, rows, tokens + 1, sources.split(","))
        names, shares = methods.split(","), [float(x) for x in densities.split(",")]
        text = None
        if needs_text(names):
            windows = text_windows(lambda x: self.lm.encode(x), calibration, min(tokens, 256))
            text = Calibration(self.lm.config, self.lm.params, windows)
        self.methods = methods_at(
            names, shares, block_size=block_size, calibration=text, model=self.lm.name
        )
        self.config = {
            "model": self.lm.name, "methods": methods, "densities": densities,
            "block_size": block_size, "documents": rows, "tokens": tokens,
            "calibration": calibration, "sources": sources,
        }  # fmt: skip
        self.options = (
            f"{model} --methods {methods} --densities {densities} --block-size {block_size} "
            f"--rows {rows} --tokens {tokens} --calibration {calibration} --sources {sources}"
        )

    def command(self, name: str, more: str = "") -> str:
        return f"python tools/reproduce/reproduce_sparsity.py {name} {self.options}{more}"

    def forms(self) -> Iterator[tuple[dict[str, Any], Any]]:
        """(name and density, parameters) of every method, one after another."""
        for name, method in self.methods:
            record = {"method": name, "density": method.describe().get("density")}
            print(label_of(record), file=sys.stderr)
            yield record, self.lm.sparsified(method).params


def label_of(row: dict[str, Any]) -> str:
    density = row.get("density")
    return row["method"] if density is None else f"{row['method']} {density:g}"


def row_of(record: dict[str, Any], keys: Sequence[str] | None = None) -> dict[str, Any]:
    """A table's row; lists are kept beside it."""
    metrics = {
        key: value
        for key, value in record.items()
        if key not in LISTS and (keys is None or key in keys)
    }
    details = {key: record[key] for key in LISTS if key in record}
    return {"row": label_of(record)} | metrics | {"details": [details]}


def curves(records: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The records of each method, by density."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        found.setdefault(record["method"], []).append(record)
    return found
