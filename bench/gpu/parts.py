"""The parts of the suite, and how they are kept from harming one another.

A part is a function that lists its steps, most important first. A worker compiles a batch of steps
side by side, then runs them one after the other. A step that hangs ends the worker, and so does one
that leaves the device unusable; the supervisor writes down which it was and starts another worker,
which goes on behind it.
"""

import faulthandler
import functools
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

from bench.gpu.rows import NO_TIME, Run, identity, rows_of
from bench.gpu.step import Step

PARTS: dict[str, float] = {  # and their shares of the time
    "environment": 20, "correctness": 85, "models": 90, "attention": 100, "torch": 40,
    "weights": 50, "states": 25, "decode": 140,
}  # fmt: skip
BATCH = min(os.cpu_count() or 1, 8)  # steps that are compiled side by side
BATCHES = {"decode": min(BATCH, 4)}  # whole models are traced one after the other
STEP_LIMIT = 40.0  # seconds
GRACE = 10.0  # seconds that a step may take beyond the time of its part
SUITE = Path(__file__).parents[1] / "gpu_suite.py"


def supervise(run: Run, parts: Mapping[str, float], budget: float, in_process: bool) -> None:
    """Runs the parts; what one leaves of its time goes to the later ones."""
    end = time.monotonic() + budget - 2 * GRACE - 5  # what the last part may overrun; the summary
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
    """Starts workers until one comes to the end or there is no time for another."""
    batch = BATCHES.get(part, BATCH)
    while True:
        left = max(until - time.monotonic(), 0)
        command = [sys.executable, str(SUITE), "--worker-of", run.number, "--only", part]
        command += ["--budget", f"{left:.0f}", "--out", str(run.out), "--batch", str(batch)]
        _begun(run).unlink(missing_ok=True)
        try:
            status = subprocess.run([*command, *run.flags], timeout=left + GRACE).returncode
        except subprocess.TimeoutExpired:
            status = "killed"
        if status == 0:
            break
        begun = json.loads(_begun(run).read_text()) if _begun(run).exists() else [{"part": part}]
        done = {identity(row.config) for row in rows_of(run)}
        is_known = identity(begun[0]) in done  # the worker has said itself what it was
        if len(begun) == 1 and not is_known:
            why = f"the process ended with status {status}: it crashed or took too long"
            is_late = time.monotonic() > until
            run.add(run.environment(), begun[0], NO_TIME if is_late else {"error": why})
        if "op" not in begun[0] or status == "killed":
            break
        if len(begun) > 1:
            batch = 1  # so that the one that cannot be compiled is known
    _begun(run).unlink(missing_ok=True)


def work(run: Run, part: str, until: float, batch: int, *, can_exit: bool) -> None:
    """Runs the steps of a part that have no row yet."""
    steps = importlib.import_module(f"bench.gpu.{part}_part").steps(run)
    done = {identity(row.config) for row in rows_of(run)}
    match = "" if part == "environment" else run.match  # of which the others need the bandwidth
    steps = [s for s in steps if identity(s.config) not in done and match in identity(s.config)]
    env = run.environment(device_kind(part))
    for first in range(0, len(steps), batch):
        some = steps[first : first + batch]
        if time.monotonic() > until:
            for step in some:
                run.add(env, step.config, NO_TIME)
            continue
        limit = until - time.monotonic()
        _begin(run, some, min(limit, len(some) * STEP_LIMIT), can_exit)
        with ThreadPoolExecutor(batch) as pool:
            failures = list(pool.map(functools.partial(_prepared, until=until), some))
        for step, failure in zip(some, failures, strict=True):
            if failure is None and time.monotonic() > until:
                failure = NO_TIME
            if failure is None:
                _begin(run, [step], min(until - time.monotonic(), STEP_LIMIT), can_exit)
            run.add(env, step.config, failure or _tried(step.run))
            step.drop()
            if can_exit and not _device_works(part):
                os._exit(3)  # an illegal access breaks every later call of the process
    faulthandler.cancel_dump_traceback_later()


def _begin(run: Run, steps: list[Step], limit: float, can_exit: bool) -> None:
    """Writes down what is tried, and ends the process if that does not return in time."""
    if can_exit:
        run.out.mkdir(parents=True, exist_ok=True)
        _begun(run).write_text(json.dumps([step.config for step in steps]))
        faulthandler.dump_traceback_later(max(limit, 0) + GRACE - 1, exit=True)


def _prepared(step: Step, until: float) -> dict[str, Any] | None:
    """Compiles a step; returns what went wrong."""
    if time.monotonic() > until:
        return NO_TIME
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


def _begun(run: Run) -> Path:
    return run.out / "begun.json"
