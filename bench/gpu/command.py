"""The command line of the suite; see `bench/gpu_suite.py`."""

import argparse
import os
import sys
import time
from pathlib import Path

from bench.gpu.needs import stand_in_for_jaxtyping
from bench.gpu.parts import BATCH, PARTS, supervise, work
from bench.gpu.rows import Run, failed_checks, rows_of
from bench.gpu.summary import write_summary
from bench.harness import RESULTS


def main(arguments: list[str] | None = None) -> int:
    """Runs the suite and returns its exit status."""
    options = parser().parse_args(arguments)
    stand_in_for_jaxtyping()
    if options.interpret:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    run = Run(
        out=options.out, seed=options.seed, quick=options.quick, interpret=options.interpret,
        match=options.match, number=options.worker_of or time.strftime("%Y%m%dT%H%M%S"),
    )  # fmt: skip
    if options.worker_of:
        work(run, options.only, time.monotonic() + options.budget, options.batch, can_exit=True)
        return 0
    if options.only != "report":
        parts = PARTS if options.only is None else {options.only: PARTS[options.only]}
        supervise(run, parts, options.budget, options.in_process)
    print(write_summary(run.out), flush=True)
    failures = failed_checks(rows_of(run))
    for row in failures:
        print(f"FAILED {row.config}: {row.metrics}", file=sys.stderr)
    return 1 if failures else 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="Every GPU measurement.")
    made.add_argument("--only", choices=[*PARTS, "report"], help="one part")
    made.add_argument("--match", default="", help="only steps whose configuration holds this text")
    made.add_argument("--out", type=Path, default=RESULTS / "gpu", help="folder of the results")
    made.add_argument("--budget", type=float, default=480, help="seconds, for everything")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--quick", action="store_true", help="tiny shapes; says nothing about speed")
    made.add_argument("--interpret", action="store_true", help="interpreted kernels, on any device")
    made.add_argument("--in-process", action="store_true", help="no process per part: for tests")
    made.add_argument("--worker-of", help=argparse.SUPPRESS)
    made.add_argument("--batch", type=int, default=BATCH, help=argparse.SUPPRESS)
    return made
