"""Every GPU measurement in one command: `python bench/gpu_suite.py`, at most `--budget` seconds.

Parts, in order: environment, correctness, attention, torch, weights, states, decode. Each runs in a
process of its own until its share of the time is spent, every row is in `suite.jsonl` as soon as it
is measured, and a step that fails, hangs or takes its process down is a row that says so. Then the
plots and `suite.md` are written (alone: `--only report`). The exit status is 1 if a check of a
kernel failed.

`--interpret --quick` tries everything out on a CPU: tiny shapes, interpreted kernels, times without
meaning, which the rows say.
"""

import os
import sys
from pathlib import Path


def prepare() -> None:
    """Makes the checkout importable, and jax a user of most of the memory, before it starts."""
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    # A worker has the device to itself; the rest is for modules, graphs and libraries.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")


if __name__ == "__main__":
    prepare()
    from bench.gpu.command import main

    sys.exit(main())
