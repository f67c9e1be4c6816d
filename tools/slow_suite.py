"""Runs the slow tests in parts, so that a machine that is shared or switched off can go on.

    python tools/slow_suite.py RUN_DIR [--shard 1/3]

A part is one file of `tests/`; what it did is a line of `RUN_DIR/results.jsonl`, and parts that
stand there are not run again. Several machines share the work with `--shard K/N`, which takes every
N-th file. Ends with the counts of all parts; exits with 1 if a test failed.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("passed", "failed", "error", "errors", "skipped")
NOTHING_RAN = 5  # pytest's exit code


def slow_files() -> list[str]:
    """The test files that hold slow tests, sorted."""
    command = [sys.executable, "-m", "pytest", "-m", "slow", "--collect-only", "tests"]
    command += ["-o", "addopts=-q"]  # a line per test; more -q would count them per file
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    files = sorted({line.split("::")[0] for line in done.stdout.splitlines() if "::" in line})
    if done.returncode or not files:
        raise SystemExit(f"no slow tests were collected:\n{done.stdout[-2000:]}{done.stderr}")
    return files


def run_part(file: str, log: Path) -> dict[str, object]:
    """Runs the slow tests of one file; its output goes to `log`."""
    start = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-m", "slow", "-rfE", "--durations=5", file]
    with open(log, "w", encoding="utf-8") as out:
        done = subprocess.run(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""]
    counts = {
        kind: int(number) for number, kind in re.findall(r"(\d+) (\w+)", lines[-1]) if kind in KINDS
    }
    failed = [line.split(" ")[1] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    if done.returncode not in (0, 1, NOTHING_RAN):
        failed.append(f"{file}: pytest ended with {done.returncode}")
    return {
        "file": file,
        "seconds": round(time.monotonic() - start),
        "counts": counts,
        "failed": failed,
    }


def main(
    run_dir: Annotated[Path, typer.Argument(help="Working folder, outside the repository.")],
    shard: Annotated[str, typer.Option(help="K/N: every N-th file, from the K-th on.")] = "1/1",
) -> None:
    """Runs the slow tests that have not run yet."""
    part = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", shard)
    if part is None or int(part[1]) > int(part[2]):
        raise typer.BadParameter(f"--shard must be K/N with K from 1 to N, got {shard!r}")
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    run_dir.mkdir(parents=True, exist_ok=True)
    results = run_dir / "results.jsonl"
    done = (
        [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    )
    files = slow_files()[int(part[1]) - 1 :: int(part[2])]
    for file in files:
        if file in {row["file"] for row in done}:
            continue
        done.append(run_part(file, run_dir / f"{file.replace('/', '-')}.log"))
        with open(results, "a", encoding="utf-8") as out:
            out.write(json.dumps(done[-1]) + "\n")
        typer.echo(f"{file}: {done[-1]['counts']} in {done[-1]['seconds']} s")
    total = {kind: sum(row["counts"].get(kind, 0) for row in done) for kind in KINDS}
    typer.echo(" ".join(f"{number} {kind}" for kind, number in total.items() if number))
    failed = [name for row in done for name in row["failed"]]
    for name in failed:
        typer.echo(f"FAILED {name}", err=True)
    raise typer.Exit(bool(failed))


if __name__ == "__main__":
    typer.run(main)
