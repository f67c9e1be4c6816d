"""Tables of one measurement under several policies: the full cache, the policy asked for, and the
baseline that keeps as many tokens as fit into the policy's bytes.

A row without its bytes says nothing, so every row has them; a table is printed as Markdown and
kept as a JSON Lines record of the benchmarks, which tells the machine and the versions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxinfer.cache.policy import Policy
from jaxinfer.cache.presets import PolicyLike, full, resolve
from jaxinfer.decode.model import Model
from jaxinfer.environment import environment
from jaxinfer.eval.memory import bytes_per_token, equal_memory
from jaxinfer.records import Record, append
from jaxinfer.typing import Json


@dataclass(frozen=True)
class Row:
    """One policy's metrics; bytes are per token of the table's length and for all layers."""

    label: str
    policy: str
    bytes_per_token: float
    share: float  # of the full cache's bytes
    metrics: Json
    details: Sequence[Json] | None = None  # JSON-ready: cells or points behind the metrics

    def to_dict(self) -> Json:
        return {
            "row": self.label,
            "policy": self.policy,
            "bytes_per_token": self.bytes_per_token,
            "share_of_full": self.share,
            **self.metrics,
        }


def contenders(
    lm: Model, policy: PolicyLike, length: int, baseline: str | None = "streaming"
) -> dict[str, Policy]:
    """The policies of a table by label: full, policy, and the baseline of the same bytes.

    A table of the full cache has one row. A policy that is its own baseline is compared with the
    plain window of the same bytes instead.
    """
    policy = resolve(policy)
    if policy == full():
        return {"full": policy}
    rows = {"full": full(), "policy": policy}
    if baseline is not None:
        rival = equal_memory(lm, policy, length, baseline)
        rows["equal memory"] = (
            equal_memory(lm, policy, length, "window") if rival == policy else rival
        )
    return rows


def compare(
    lm: Model,
    policies: Mapping[str, Policy],
    length: int,
    measure: Callable[[Policy], Json],
) -> list[Row]:
    """A row per policy; `length` is the text length in tokens that the bytes refer to. What
    `measure` returns as "details" is kept beside the metrics."""
    whole = bytes_per_token(lm, full(), length)
    rows = []
    for label, policy in policies.items():
        needed = bytes_per_token(lm, policy, length)
        metrics = dict(measure(policy))
        details = metrics.pop("details", None)
        rows.append(Row(label, describe(policy), needed, needed / whole, metrics, details))
    return rows


def describe(policy: Policy) -> str:
    """The policy's name and what its tiers keep, in tokens or as a share of the text."""
    sizes = []
    for tier in policy.tiers:
        for name in ("size", "residual", "rank"):
            if hasattr(tier, name):
                sizes.append(f"{type(tier).__name__.lower()} {getattr(tier, name)}")
    return f"{policy.name} ({', '.join(sizes)})" if sizes else policy.name


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table with a column per metric."""
    return markdown_table([row.to_dict() for row in rows])


def markdown_table(records: Sequence[Json]) -> str:
    """A Markdown table with a column per key."""
    columns = list(dict.fromkeys(name for record in records for name in record))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for record in records:
        lines.append("| " + " | ".join(_cell(record.get(name)) for name in columns) + " |")
    return "\n".join(lines)


def save(
    name: str,
    config: Json,
    rows: Sequence[Row],
    folder: Path,
    *,
    seed: int = 0,
    command: str = "",
) -> Path:
    """Appends the table to `folder/eval-NAME.jsonl` as a record of the benchmarks, with the
    environment."""
    record = Record(
        name=f"eval-{name}",
        config=dict(config),
        metrics={"rows": [row.to_dict() | {"details": row.details} for row in rows]},
        env=environment(),
        command=command,
        seed=seed,
    )
    return append(record, folder)


def _cell(value: object) -> str:
    if value is None or value == "":
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else f"{value}".replace("|", "/")
