"""The fastest tiling of every GPU kernel on the device at hand, for `pallas_kernels.tuned` to use.

Each problem is one use of a kernel. All candidates of its `configs.py` are compared with the
reference on it; those that agree are timed in a loop on the device, as `bench/gpu_suite.py` does.
The best is written after each problem to the package's file of this kind of device, next to what
the file holds. A problem that `--budget` cuts short replaces no earlier entry.

    python tools/kernels/tune_kernels.py --budget 1500
    python tools/kernels/tune_kernels.py --interpret --quick --only modal_step --save new.json

`--interpret --quick` tries everything out without a GPU: tiny problems, times without meaning. The
exit status is 1 where a candidate was wrong, 2 without a GPU.
"""

import argparse
import itertools
import json
import os
import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.gpu.needs import stand_in_for_jaxtyping

stand_in_for_jaxtyping()  # before what annotates with it

from tools.kernels.tuning_problems import KERNELS, Step, TimedUse  # noqa: E402

MARGIN = 0.98  # of the heuristic's time, what another tiling must stay below: the rest is noise


@dataclass(kw_only=True)
class Row:
    """What came of a problem; `times` are microseconds by configuration."""

    kernel: str
    key: str
    default: Any
    total: int
    times: dict[Any, float] = field(default_factory=dict)
    dropped: int = 0
    is_wrong: bool = False

    @property
    def best(self) -> Any:
        """The fastest, or the heuristic's choice if that is as good; None where none is right."""
        if not self.times:
            return None
        fastest = min(self.times, key=self.times.__getitem__)
        limit = MARGIN * self.times.get(self.default, float("inf"))
        return fastest if self.times[fastest] < limit else self.default

    @property
    def is_complete(self) -> bool:
        return len(self.times) + self.dropped == self.total


def problems_of(run: Any, names: list[str]) -> list[TimedUse]:
    """The first problem of every kernel, then the second ones, ...: a budget reaches them all."""
    rounds = itertools.zip_longest(*(KERNELS[name](run) for name in names))
    return [problem for some in rounds for problem in some if problem is not None]


def search(run: Any, problem: TimedUse, end: float) -> Row:
    """Tries candidates, the heuristic's choice first, until all are tried or it is `end`."""
    import jax

    from pallas_kernels.checks import error_of
    from pallas_kernels.tuned import lookups

    seed = jax.ShapeDtypeStruct((), "uint32")
    step = problem.make(run.kernel, None)
    with lookups() as asked:
        state, given = jax.eval_shape(step.inputs, seed)
        jax.eval_shape(step.call, state, *given)
    (asked,) = asked
    configs = problem.candidates(*asked.sizes)
    row = Row(kernel=problem.kernel, key=asked.key, default=asked.default, total=len(configs))
    reference = problem.make("reference", None)
    with jax.default_matmul_precision("highest"):
        wanted = jax.device_get(compiled(problem, reference)(*filled_by(run, reference)))

    def prepare(config: Any) -> tuple[Any, Any] | Exception:
        try:
            step = problem.make(run.kernel, config)
            skipped = step.prepare()
            return MemoryError(skipped["skipped"]) if skipped else (step, compiled(problem, step))
        except Exception as error:  # what does not compile is no candidate
            return error

    def drop(config: Any, why: object) -> None:
        row.dropped += 1
        print(f"{row.kernel}, {row.key}: dropped {config}: {why}", file=sys.stderr, flush=True)

    batch = os.cpu_count() or 1
    for first in range(0, len(configs), batch):
        if time.monotonic() > end:
            break
        some = configs[first : first + batch]
        with ThreadPoolExecutor(len(some)) as pool:
            prepared = list(pool.map(prepare, some))
        for config, found in zip(some, prepared, strict=True):
            if isinstance(found, Exception):
                drop(config, f"{type(found).__name__}: {found}".partition("\n")[0][:200])
                continue
            step, program = found
            try:
                error = error_of(jax.device_get(program(*filled_by(run, step))), wanted)
                if error <= problem.tolerance:  # not so for NaN
                    row.times[config] = step.run()["us"]
                else:
                    row.is_wrong = True
                    drop(config, f"wrong by {error:.3g}, more than {problem.tolerance:.3g}")
            except Exception as failure:
                drop(config, f"{type(failure).__name__}: {failure}".partition("\n")[0][:200])
            step.drop()
    return row


def compiled(problem: TimedUse, step: Step) -> Any:
    """The program of one call, its results as the problem views them."""
    import jax

    def call(state: Any, given: tuple) -> Any:
        return problem.view(step.call(state, *given))

    seed = jax.ShapeDtypeStruct((), "uint32")
    return jax.jit(call).lower(*jax.eval_shape(step.inputs, seed)).compile()


def filled_by(run: Any, step: Step) -> Any:
    import jax
    import jax.numpy as jnp

    return jax.jit(step.inputs)(jnp.uint32(run.seed))


def store(path: Path, row: Row, header: dict[str, Any]) -> None:
    """Adds the best configuration to what `path` holds, which is replaced at once."""
    from pallas_kernels.tuned import read

    kernels = read(path)
    entries = kernels.setdefault(row.kernel, {})
    if row.is_complete or row.key not in entries:
        entries[row.key] = asdict(row.best)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    record = header | {"kernels": {name: kernels[name] for name in sorted(kernels)}}
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def table(rows: list[Row]) -> str:
    lines = [["kernel", "sizes", "best", "us", "heuristic us", "ratio", "right"]]
    for row in rows:
        best, default = row.times.get(row.best), row.times.get(row.default)
        ratio = f"{default / best:.2f}" if best and default else "-"
        us = (f"{x:.2f}" if x else "-" for x in (best, default))
        right = f"{len(row.times)} of {row.total}"
        lines.append([row.kernel, row.key, changes(row), *us, ratio, right])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def changes(row: Row) -> str:
    """In what the best configuration differs from the heuristic's."""
    if row.best is None:
        return "none is right"
    default = asdict(row.default)
    found = [f"{name} {n}" for name, n in asdict(row.best).items() if n != default[name]]
    return ", ".join(found) or "the heuristic's"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--only", nargs="+", choices=KERNELS, default=list(KERNELS))
    made.add_argument("--budget", type=float, default=1500, help="seconds, for everything")
    made.add_argument("--save", type=Path, help="file to write (default: this device's, packaged)")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--quick", action="store_true", help="tiny problems; written to --save only")
    made.add_argument("--interpret", action="store_true", help="interpreted kernels, on any device")
    return made


def main(argv: list[str] | None = None) -> int:
    """Runs the search and returns the exit status."""
    options = parser().parse_args(argv)
    end = time.monotonic() + options.budget
    import jax

    if options.interpret and "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")
    from bench.gpu.rows import Run
    from bench.harness import RESULTS
    from pallas_kernels import tuned

    if not options.interpret and jax.default_backend() != "gpu":
        print("no GPU here; --interpret --quick tries the search out", file=sys.stderr)
        return 2
    device, path = jax.devices()[0].device_kind, options.save
    if options.interpret or options.quick:
        if path is not None and tuned.FOLDER.parent in path.resolve().parents:
            parser().error(f"{path} is in the package, where trial times have no place")
    elif path is None:
        path = tuned.path_of(device)
    if path is not None:
        tuned.read(path)  # a damaged file is an error now, not after the first problem
    run = Run(
        out=RESULTS / "gpu", seed=options.seed, quick=options.quick, interpret=options.interpret,
        match="", number="tune",
    )  # fmt: skip
    command = shlex.join(sys.argv[1:] if argv is None else argv)
    header = {"device": device, "jax": jax.__version__, "date": time.strftime("%Y-%m-%d")}
    header |= {"command": f"python tools/kernels/tune_kernels.py {command}".strip()}
    rows = []
    for problem in problems_of(run, options.only):
        if time.monotonic() > end:
            break
        rows.append(search(run, problem, end))
        if path is not None and rows[-1].best is not None:
            store(path, rows[-1], header)
    print(table(rows), flush=True)
    return int(any(row.is_wrong for row in rows))


if __name__ == "__main__":
    sys.exit(main())
