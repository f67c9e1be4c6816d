"""JSON Lines records of measurements: what was measured, where, and what came out.

The benchmarks of a source checkout and `jaxinfer eval` write them; one file per name in a folder of
results.
"""

import dataclasses
import datetime
import errno
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Record:
    """One line of a results file. `config` says what was measured and is its identity."""

    name: str
    config: dict[str, Any]
    metrics: dict[str, Any]
    env: dict[str, Any]
    command: str
    seed: int
    time: str = field(
        default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    )

    def to_json(self) -> str:
        return json.dumps(_rounded(dataclasses.asdict(self)), allow_nan=False)


def append(record: Record, folder: Path) -> Path:
    """Adds the record to `folder/NAME.jsonl` in one write.

    A process killed in a write leaves at most one broken last line; the next record starts on a new
    line and `read_records` skips what does not parse.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record.name}.jsonl"
    line = record.to_json().encode() + b"\n"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        if os.write(descriptor, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(descriptor)
    return path


def read_records(folder: Path) -> list[Record]:
    """Every record in the folder's files, in the order of writing."""
    names = {f.name for f in dataclasses.fields(Record)}
    records = []
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                data = json.loads(line)
            except ValueError:
                continue
            if isinstance(data, dict) and names <= set(data):
                records.append(Record(**{name: data[name] for name in names}))
    return records


def latest(records: Sequence[Record]) -> list[Record]:
    """The last record of every name and config."""
    found = {(r.name, json.dumps(r.config, sort_keys=True)): r for r in records}
    return list(found.values())


def _rounded(value: Any) -> Any:
    """Six digits are enough; JSON has no NaN, so a number that is not finite becomes null."""
    if isinstance(value, dict):
        return {str(key): _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
