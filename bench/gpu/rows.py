"""One run of the suite and the rows it has written: `jaxinfer.records.Record`s named "suite".

A row's config says what was tried, its metrics what came of it: numbers, or "error" or "skipped"
with the reason. `env["run"]` tells the runs in one file apart.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxinfer.environment import environment
from jaxinfer.records import Record, append, read_records

NAME = "suite"
NO_TIME = {"skipped": "no time left"}


@dataclass(frozen=True, kw_only=True)
class Run:
    out: Path
    seed: int
    quick: bool
    interpret: bool
    match: str
    number: str

    @property
    def kernel(self) -> Any:
        """The implementation under test."""
        return "interpret" if self.interpret else "triton"

    @property
    def flags(self) -> list[str]:
        """The options that change what is measured."""
        chosen = {"--quick": self.quick, "--interpret": self.interpret}
        flags = [flag for flag, is_set in chosen.items() if is_set]
        return [*flags, *(["--match", self.match] if self.match else []), "--seed", str(self.seed)]

    def environment(self, device: str | None = None) -> dict[str, Any]:
        return environment() | {"device": device, "run": self.number}

    def add(self, env: dict[str, Any], config: dict[str, Any], metrics: dict[str, Any]) -> None:
        """Appends a row, at once, and prints it."""
        if self.quick or self.interpret:
            metrics = metrics | {"meaningless_times": True}
        command = " ".join(["python bench/gpu_suite.py", *self.flags])
        record = Record(
            name=NAME, config=config, metrics=metrics, env=env, command=command, seed=self.seed
        )
        append(record, self.out)
        print(f"{identity(config)}: {brief(metrics)}", file=sys.stderr, flush=True)


def rows_of(run: Run) -> list[Record]:
    """The rows that this run has written so far."""
    found = read_records(run.out) if run.out.is_dir() else []
    return [row for row in found if row.name == NAME and row.env.get("run") == run.number]


def identity(config: dict[str, Any]) -> str:
    return json.dumps(config, sort_keys=True)


def brief(metrics: dict[str, Any]) -> str:
    """The scalars, short."""
    plain = {name: x for name, x in metrics.items() if not isinstance(x, dict | list)}
    return ", ".join(
        f"{name} {x:.4g}" if isinstance(x, float) else f"{name} {x}" for name, x in plain.items()
    )


def failed_checks(rows: Sequence[Record]) -> list[Record]:
    """Checks that did not agree, or broke; one that was not reached has not failed."""
    checks = [row for row in rows if row.config["part"] in ("correctness", "models")]
    return [row for row in checks if "error" in row.metrics or row.metrics.get("agrees") is False]


def copy_bandwidth(out: Path) -> float | None:
    """Bytes per second of the last environment row."""
    rows = [row for row in read_records(out) if row.name == NAME] if out.is_dir() else []
    found = [
        row.metrics.get("copy_gb_per_s") for row in rows if row.config["part"] == "environment"
    ]
    return 1e9 * found[-1] if found and found[-1] else None
