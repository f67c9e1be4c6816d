"""Registers, spills, shared memory and least time of every GPU kernel; no GPU is needed.

XLA's GPU compiler runs on the CPU (`jaxinfer.inspection.gpu_target`) and dumps each kernel's PTX
and launch; `ptxas -v` of the CUDA toolkit then tells what the machine code takes. The floor is the
time to move the operands and results once at 4.3 TB/s, about nine tenths of what an H200's data
sheet says; the sums of split kernels, which XLA adds up, are not counted.

    python tools/kernels/inspect_kernels.py --save bench/results/kernels.jsonl
    python tools/kernels/inspect_kernels.py --only weight_matmul --config "16 rows" --json

What is compiled stands in each kernel's `cases.py`. The exit status is 1 where a kernel
spills.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pallas_kernels.cases import Case, every

KERNELS = every("CASES")

BYTES_PER_SECOND = 4.3e12
NO_PTXAS = (
    "ptxas is not found; put the bin folder of a CUDA toolkit on PATH, set CUDA_HOME, or "
    "`pip install triton`, which carries one"
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What the table and the JSON objects hold."""

    kernel: str
    config: str
    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    bytes: int
    operations: int
    floor_us: float


def inspect(name: str, case: Case, target: str, ptxas: str, dumps: Path) -> Row:
    """The row of one case. XLA dumps into the folder `dumps`, which is left empty."""
    import jax

    from jaxinfer.inspection.gpu_target import compile_for

    compile_for(case.function, *case.args, target=target)
    launch = case.launch or name
    entry = rf"{re.escape(launch)}(?:_\d+)?"  # XLA numbers kernels of the same name
    code = machine_code(ptxas, dumps)
    found = [numbers for named, numbers in code.items() if re.fullmatch(entry, named)]
    sequence = "".join(file.read_text() for file in dumps.glob("*.thunk_sequence.txt"))
    shared = re.findall(rf"\b{entry} grid:.*shared_memory: (\d+)", sequence)
    for file in dumps.iterdir():
        file.unlink()
    if not found or not shared:
        raise SystemExit(f"{name}: the program for {case.config!r} launches no {launch!r}")
    results = jax.eval_shape(case.function, *case.args)
    size = case.bytes or sum(
        math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves((case.args, results))
    )
    return Row(
        kernel=launch,
        config=case.config,
        target=target,
        registers=max(registers for registers, _, _ in found),
        spill_bytes=max(spills for _, spills, _ in found),
        shared_bytes=max(map(int, shared)) + max(static for _, _, static in found),
        bytes=size,
        operations=case.operations,
        floor_us=round(1e6 * size / BYTES_PER_SECOND, 3),
    )


def machine_code(ptxas: str, dumps: Path) -> dict[str, tuple[int, int, int]]:
    """Registers, bytes of spill stores and loads, and static shared bytes of each dumped kernel."""
    found = {}
    for file in dumps.glob("*.ptx"):
        arch = re.search(r"^\.target (\w+)", file.read_text(), re.MULTILINE)
        if arch is None:  # a module without code
            continue
        run = subprocess.run(
            [ptxas, "-v", f"-arch={arch[1]}", str(file), "-o", os.devnull],
            capture_output=True, text=True,
        )  # fmt: skip
        if run.returncode:
            raise SystemExit(f"{ptxas} refuses the compiler's code: {run.stderr.strip()[:300]}")
        for part in run.stderr.split("Compiling entry function '")[1:]:
            numbers = [
                sum(int(n) for n in re.findall(pattern, part))
                for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill", r"(\d+) bytes smem")
            ]
            found[part.split("'")[0]] = tuple(numbers)
    return found


def find_ptxas() -> str | None:
    """The assembler on PATH, in CUDA_HOME or in an installed triton package."""
    folders = [os.environ.get("PATH", os.defpath)]
    if home := os.environ.get("CUDA_HOME"):
        folders.append(str(Path(home, "bin")))
    spec = importlib.util.find_spec("triton")
    for package in (spec.submodule_search_locations or []) if spec else []:
        folders.append(str(Path(package, "backends", "nvidia", "bin")))
    return shutil.which("ptxas", path=os.pathsep.join(folders))


def inspect_all(names: list[str], config: str, target: str) -> list[Row]:
    """The rows of the kernels `names`, of the cases whose name contains `config`."""
    ptxas = find_ptxas()
    if ptxas is None:
        raise SystemExit(NO_PTXAS)
    with tempfile.TemporaryDirectory() as folder:
        # Read by XLA at its first use in a process, hence before anything imports jax.
        flags = [os.environ.get("XLA_FLAGS", ""), f"--xla_dump_to={folder}"]
        if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) >= (0, 11):
            flags.append("--xla_dump_emitter_re=ptx")  # else no PTX; 0.10 does not know the flag
        os.environ["XLA_FLAGS"] = " ".join(flags).strip()
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        from jaxinfer.inspection.gpu_target import unavailable_reason

        if reason := unavailable_reason():
            raise SystemExit(f"cannot compile for {target}: {reason}")
        return [
            inspect(name, case, target, ptxas, Path(folder))
            for name in names
            for case in KERNELS[name]()
            if config in case.config
        ]


def table(rows: list[Row]) -> Any:
    from rich.table import Table

    found = Table("kernel", "config", title=f"GPU kernels, compiled for {rows[0].target}")
    for name in ("registers", "spills", "shared", "MB", "Mop", "floor us"):
        found.add_column(name, justify="right")
    for row in rows:
        found.add_row(
            row.kernel, row.config, str(row.registers), str(row.spill_bytes),
            f"{row.shared_bytes:,}", f"{row.bytes / 1e6:.2f}", f"{row.operations / 1e6:.1f}",
            f"{row.floor_us:.2f}",
        )  # fmt: skip
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--config", default="", help="only configurations that contain this")
    parser.add_argument("--target", default="h200", help="a device of jaxinfer.inspection.targets")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, no table")
    parser.add_argument("--save", type=Path, help="also write the JSON lines to this file")
    options = parser.parse_args(argv)
    rows = inspect_all(options.only, options.config, options.target)
    if not rows:
        parser.error(f"no configuration of {', '.join(options.only)} contains {options.config!r}")
    lines = "".join(json.dumps(asdict(row)) + "\n" for row in rows)
    if options.json:
        print(lines, end="")
    else:
        from rich.console import Console

        Console().print(table(rows))
    if options.save:
        temporary = options.save.with_name(f".{options.save.name}.part")
        temporary.write_text(lines, encoding="utf-8")
        temporary.replace(options.save)
    return int(any(row.spill_bytes for row in rows))


if __name__ == "__main__":
    sys.exit(main())
