"""`python -m tools.fuzz`; see the package."""

import argparse
import collections
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # also of the processes that follow
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from tools.fuzz.run import fuzz, keep, replayed
from tools.fuzz.targets import TARGETS, chosen


def main() -> int:
    """Runs the command; 0 if nothing was found, 1 else."""
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--parser", action="append", choices=list(TARGETS), metavar="NAME",
        help=f"only this one; repeatable; one of {', '.join(TARGETS)}",
    )  # fmt: skip
    parser.add_argument("--processes", type=int, default=None, help="default: one per core")
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"))
    parser.add_argument("--replay", type=Path, help="the folder of a finding")
    options = parser.parse_args()
    if options.replay is not None:
        wrong = replayed(options.replay, list(TARGETS.values()))
        print(wrong or "read, or refused by one line")
        return wrong is not None
    return _search(options)


def _search(options: argparse.Namespace) -> int:
    targets, begun = chosen(options.parser), time.monotonic()
    found: collections.Counter[tuple[str, str]] = collections.Counter()
    done, said = 0, begun
    for done, finding in fuzz(targets, options.inputs, options.seed, options.processes):
        if finding is not None:
            kind = (finding.input.target, finding.error.split(":")[0][:60])
            found[kind] += 1
            place = keep(finding, options.seed, options.findings, targets)
            if found[kind] <= 5:
                print(f"{place}: {finding.error}", flush=True)
        if sys.stderr.isatty() and time.monotonic() - said > 1:
            said = time.monotonic()
            print(f"\r{done} inputs", end="", file=sys.stderr)
    seconds = time.monotonic() - begun
    print(f"{done} inputs of {len(targets)} parsers in {seconds:.0f} s, seed {options.seed}")
    for (name, error), count in sorted(found.items()):
        print(f"  {name}: {count} times {error}")
    print(f"{sum(found.values())} findings")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
