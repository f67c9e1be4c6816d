"""The parts of the suite, and how they are kept from harming one another.

A part is a function that lists its steps, most important first. A worker compiles a batch of steps
side by side, then runs them one after the other. A step that hangs ends the worker, and so does one
that leaves the device unusable; the supervisor writes down which it was and starts another worker,
which goes on behind it.
"""

import faulthandler
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.gpu.rows import Run, identity, rows_of
from bench.gpu.step import Step

PARTS: dict[str, float] = {  # and their shares of the time
    "environment": 20, "correctness": 100, "attention": 120, "torch": 45, "weights": 55,
    "states": 25, "decode": 115,
}  # fmt: skip
STEP_LIMIT = 60.0  # seconds of a step, and of a batch that compiles
GRACE = 10.0  # seconds that a step may take beyond the time of its part
SUITE = Path(__file__).parents[1] / "gpu_suite.py"


def supervise(run: Run, parts: Mapping[str, float], budget: float, in_process: bool) -> None:
    """Runs the parts; what one leaves of its time goes to the later ones."""
    end = time.monotonic() + budget - GRACE - 5  # for the summary
    shares = dict(parts)
    for name in parts:
        left = end - time.monotonic()
        until = time.monotonic() + max(left, 0) * shares[name] / sum(shares.values())
        shares.pop(name)
        if in_process:
            work(run, name, until, batch=1, can_exit=False)
        else:
            _watch(run, name, until)


def _watch(run: Run, part: str, until: float) -> None:
    batch = os.cpu_count() or 1
    while True:
        left = max(until - time.monotonic(), 0)
        command = [sys.executable, str(SUITE), "--worker-of", run.number, "--only", part]
        command += ["--budget", f"{left:.0f}", "--out", str(run.out), "--batch", str(batch)]
        _current(run).unlink(missing_ok=True)
        try:
            status = subprocess.run([*command, *run.flags], timeout=left + GRACE).returncode
        except subprocess.TimeoutExpired:
            status = "killed"
        if status == 0:
            break
        current = _current(run)
        config = json.loads(current.read_text()) if current.exists() else {"part": part}
        done = {identity(row.config) for row in rows_of(run)}
        if identity(config) not in done:  # else the worker has said itself what happened
            why = f"the process ended with status {status}: it crashed or took too long"
            run.add(run.environment(), config, {"error": why})
        if not current.exists() or status == "killed":
            break  # nothing can be run here, or there is no time to
        batch = 1  # so that the next such step is known by its name
    _current(run).unlink(missing_ok=True)


def work(run: Run, part: str, until: float, batch: int, *, can_exit: bool) -> None:
    """Runs the steps of a part that have no row yet."""
    steps = importlib.import_module(f"bench.gpu.{part}_part").steps(run)
    done = {identity(row.config) for row in rows_of(run)}
    steps = [s for s in steps if identity(s.config) not in done and run.match in identity(s.config)]
    env = run.environment(device_kind(part))
    for first in range(0, len(steps), batch):
        some = steps[first : first + batch]
        if time.monotonic() > until:
            for step in some:
                run.add(env, step.config, {"skipped": "no time left"})
            continue
        _begin(run, some[0], until, can_exit)
        with ThreadPoolExecutor(batch) as pool:
            failures = list(pool.map(_prepared, some))
        for step, failure in zip(some, failures, strict=True):
            if failure is None and time.monotonic() > until:
                failure = {"skipped": "no time left"}
            if failure is None:
                _begin(run, step, until, can_exit)
            run.add(env, step.config, failure or _tried(step.run))
            step.drop()
            if can_exit and not _device_works(part):
                os._exit(3)  # an illegal access breaks every later call of the process
    faulthandler.cancel_dump_traceback_later()


def _begin(run: Run, step: Step, until: float, can_exit: bool) -> None:
    """Writes down what is tried, and ends the process if that does not return."""
    if can_exit:
        run.out.mkdir(parents=True, exist_ok=True)
        _current(run).write_text(json.dumps(step.config))
        limit = min(STEP_LIMIT, max(until - time.monotonic(), 0) + GRACE - 1)
        faulthandler.dump_traceback_later(limit, exit=True)


def _prepared(step: Step) -> dict[str, Any] | None:
    """What went wrong while a step was compiled."""
    found = _tried(lambda: step.prepare() or {})
    return found if "error" in found or "skipped" in found else None


def _tried(function: Any) -> dict[str, Any]:
    try:
        return function()
    except Exception as error:  # whatever it is, the other steps go on
        return {"error": f"{type(error).__name__}: {error}".strip()[:300]}


def _device_works(part: str) -> bool:
    if part == "torch":
        return True
    import jax.numpy as jnp

    return "error" not in _tried(lambda: {"sum": float(jnp.ones(8).sum())})


def device_kind(part: str) -> str | None:
    """The device's name; of torch in its own part, which jax leaves alone."""
    if part == "torch":
        from bench.gpu.torch_part import device_name

        return device_name()
    import jax

    return jax.devices()[0].device_kind


def _current(run: Run) -> Path:
    return run.out / "current.json"
