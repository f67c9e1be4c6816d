"""The fastest tiling of every GPU kernel on the device at hand, for `pallas_kernels.tuned` to use.

Each problem is one use of a kernel. All candidates of its `configs.py` are compared with the
reference on it; those that agree are timed in a loop on the device, as `bench/gpu_suite.py` does.
The best is written after each problem to the package's file of this kind of device, next to what
the file holds. A problem that `--budget` cuts short replaces no earlier entry.

    python tools/tune_kernels.py --budget 1500
    python tools/tune_kernels.py --interpret --quick --only modal_step --save /tmp/tuned.json

`--interpret --quick` tries everything out without a GPU: tiny problems, times without meaning. The
exit status is 1 where a candidate was wrong, 2 without a GPU.
"""

import argparse
import functools
import itertools
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

MOST_TOKENS = 2**18  # of a batch: the reference makes all packed codes float32 numbers at once
MARGIN = 0.98  # of the heuristic's time, what another tiling must stay below: the rest is noise
GROUP = 32  # of packed codes
Step = Any  # bench.gpu.timing.Timed


def same(results: Any) -> Any:
    return results


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One use of a kernel: `make(implementation, config)` is its step, whose results, as `view`
    shows them, may differ from the reference's by `tolerance` of each output's magnitude."""

    kernel: str
    make: Callable[..., Step]
    candidates: Callable[..., list[Any]]
    tolerance: float
    view: Callable[[Any], Any] = same


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


KERNELS: dict[str, Callable[[Any], Iterator[Problem]]] = {}


def kernel(problems: Callable[[Any], Iterator[Problem]]) -> Callable[[Any], Iterator[Problem]]:
    """Registers a kernel under the name of the function that yields its problems."""
    KERNELS[problems.__name__] = problems
    return problems


@kernel
def kivi_attention(run: Any) -> Iterator[Problem]:
    from bench.gpu.attention_part import timed
    from pallas_kernels.kivi_attention.configs import candidates

    for shape, bits in itertools.product(attention_shapes(run), (2, 4, 8)):
        make = functools.partial(timed, run, *shape, bits)
        yield Problem(kernel="kivi_attention", make=make, candidates=candidates, tolerance=3e-2)


@kernel
def dense_attention(run: Any) -> Iterator[Problem]:
    from bench.gpu.attention_part import timed
    from pallas_kernels.dense_attention.configs import candidates

    for shape in attention_shapes(run):
        make = functools.partial(timed, run, *shape, None)
        yield Problem(kernel="dense_attention", make=make, candidates=candidates, tolerance=3e-2)


def attention_shapes(run: Any) -> list[tuple[str, int, int]]:
    """(model, batch, slots), those of the suite of which the reference has room for all."""
    from bench.gpu.attention_part import shapes

    return [shape for shape in shapes(run) if shape[1] * shape[2] <= MOST_TOKENS]


@kernel
def weight_matmul(run: Any) -> Iterator[Problem]:
    from bench.gpu.weights_part import PRODUCTS, ROWS, product
    from pallas_kernels.weight_matmul.configs import candidates

    shapes = ((128, 192),) if run.quick else PRODUCTS
    for (inputs, outputs), rows, bits in itertools.product(shapes, ROWS, (4, 8)):
        make = functools.partial(product, run, rows, inputs, outputs, bits)
        yield Problem(kernel="weight_matmul", make=make, candidates=candidates, tolerance=5e-5)


@kernel
def sparse_mlp(run: Any) -> Iterator[Problem]:
    from bench.gpu.weights_part import BLOCKS, ROWS, mlp
    from pallas_kernels.sparse_mlp.configs import candidates

    blocks = ((64, 160),) if run.quick else BLOCKS
    for (width, neurons), rows, density in itertools.product(blocks, ROWS, (1.0, 0.25)):
        make = functools.partial(mlp, run, rows, width, neurons, density)
        yield Problem(kernel="sparse_mlp", make=make, candidates=candidates, tolerance=3e-2)


@kernel
def quantize_pack(run: Any) -> Iterator[Problem]:
    from bench.gpu.states_part import flush
    from pallas_kernels.kivi_attention.reference import unpacked
    from pallas_kernels.quantize_pack.configs import candidates

    def numbers(results: Any, bits: int, is_key: bool) -> Any:
        """Codes as numbers: next to a half one may differ by 1. Nothing is written behind 384."""
        import jax.numpy as jnp

        half, _ = results
        end = 384 * bits // 32 if is_key else 384
        one, none = jnp.ones((1, 1, 1, 1)), jnp.zeros((1, 1, 1, 1))
        return unpacked(half.words[:, :, :end], one, none, bits, is_key), half.scale, half.zero

    for is_key, bits in itertools.product((True, False), (2, 4)):
        yield Problem(
            kernel="quantize_pack", candidates=candidates, tolerance=1.001 / (2**bits - 1),
            make=functools.partial(flush, run, bits=bits, group=GROUP, is_key=is_key),
            view=functools.partial(numbers, bits=bits, is_key=is_key),
        )  # fmt: skip


@kernel
def low_rank_read(run: Any) -> Iterator[Problem]:
    from bench.gpu.states_part import read
    from pallas_kernels.less_state.configs import candidates

    make = functools.partial(read, run)
    yield Problem(kernel="low_rank_read", make=make, candidates=candidates, tolerance=5e-3)


@kernel
def low_rank_update(run: Any) -> Iterator[Problem]:
    from bench.gpu.states_part import update
    from pallas_kernels.less_state.configs import candidates

    make = functools.partial(update, run)
    yield Problem(kernel="low_rank_update", make=make, candidates=candidates, tolerance=5e-3)


@kernel
def modal_step(run: Any) -> Iterator[Problem]:
    from bench.gpu.states_part import modal
    from pallas_kernels.modal_step.configs import candidates

    make = functools.partial(modal, run)
    yield Problem(kernel="modal_step", make=make, candidates=candidates, tolerance=1e-2)


@kernel
def hyena_step(run: Any) -> Iterator[Problem]:
    from bench.gpu.states_part import hyena
    from pallas_kernels.modal_step.configs import candidates

    for shape in [(2, 64, 4)] if run.quick else [(64, 4096, 8), (1, 4096, 8)]:
        make = functools.partial(hyena, run, *shape)
        yield Problem(kernel="hyena_step", make=make, candidates=candidates, tolerance=1e-2)


@kernel
def add_norm(run: Any) -> Iterator[Problem]:
    from bench.gpu.states_part import norm
    from pallas_kernels.add_norm.configs import candidates

    for rows in (1, 8, 64):
        make = functools.partial(norm, run, rows=rows)
        yield Problem(kernel="add_norm", make=make, candidates=candidates, tolerance=3e-2)


@kernel
def sparse_heads(run: Any) -> Iterator[Problem]:
    from bench.gpu.attention_part import half_of_heads
    from pallas_kernels.sparse_heads.configs import candidates

    for shape in attention_shapes(run):
        make = functools.partial(half_of_heads, run, *shape)
        yield Problem(kernel="sparse_heads", make=make, candidates=candidates, tolerance=3e-2)


@kernel
def key_mass(run: Any) -> Iterator[Problem]:
    from bench.gpu.attention_part import mass
    from pallas_kernels.dense_attention.configs import mass_candidates

    for shape in attention_shapes(run):
        make = functools.partial(mass, run, *shape)
        yield Problem(kernel="key_mass", make=make, candidates=mass_candidates, tolerance=3e-2)


def problems_of(run: Any, names: list[str]) -> list[Problem]:
    """The first problem of every kernel, then the second ones, ...: a budget reaches them all."""
    rounds = itertools.zip_longest(*(KERNELS[name](run) for name in names))
    return [problem for some in rounds for problem in some if problem is not None]


def search(run: Any, problem: Problem, end: float) -> Row:
    """Tries candidates, the heuristic's choice first, until all are tried or it is `end`."""
    import jax

    from bench.gpu.correctness_part import error_of
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


def compiled(problem: Problem, step: Step) -> Any:
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
    from bench.gpu.needs import stand_in_for_jaxtyping

    options = parser().parse_args(argv)
    end = time.monotonic() + options.budget
    stand_in_for_jaxtyping()
    if options.interpret:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

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
    header |= {"command": f"python tools/tune_kernels.py {command}".strip()}
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
