"""Registers, spills, shared memory and least time of every GPU kernel; no GPU is needed.

XLA's GPU compiler runs on the CPU (`jaxinfer.compile.gpu_target`) and dumps each kernel's PTX and
launch; `ptxas -v` of the CUDA toolkit then tells what the machine code takes. The floor is the time
to move the operands and results once at 4.3 TB/s, about nine tenths of what an H200's data sheet
says; the sums of split kernels, which XLA adds up, are not counted.

    python tools/inspect_kernels.py --save bench/results/kernels.jsonl
    python tools/inspect_kernels.py --only weight_matmul --config "16 rows" --json

A new kernel is one more function with `@kernel`, named as its folder, that yields a `Case` for each
typical use. The exit status is 1 where a kernel spills.
"""

import argparse
import functools
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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

BYTES_PER_SECOND = 4.3e12
NO_PTXAS = (
    "ptxas is not found; put the bin folder of a CUDA toolkit on PATH, set CUDA_HOME, or "
    "`pip install triton`, which carries one"
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One use of a kernel. `launch` is the name that it is launched by (default: its folder's)."""

    config: str
    function: Callable[..., Any]
    args: tuple[Any, ...]  # trees of ShapeDtypeStruct
    operations: int
    bytes: int | None = None  # default: all of `args` and of the results, once
    launch: str | None = None


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


KERNELS: dict[str, Callable[[], Iterator[Case]]] = {}


def kernel(cases: Callable[[], Iterator[Case]]) -> Callable[[], Iterator[Case]]:
    """Registers a kernel under the name of the function that yields its cases."""
    KERNELS[cases.__name__] = cases
    return cases


def array(*shape: int, dtype: str = "bfloat16") -> Any:
    import jax

    return jax.ShapeDtypeStruct(shape, dtype)


@kernel
def dense_attention() -> Iterator[Case]:
    from pallas_kernels.dense_attention import dense_attention as attend
    from pallas_kernels.dense_attention import key_mass

    for name, b, k, g, t, h, slots in (
        ("llama-3 8B, 8 rows, 8k", 8, 8, 4, 1, 128, 8192),
        ("llama-2 7B, 1 row, 4k", 1, 32, 1, 1, 128, 4096),
        ("smollm2, tree of 64, 8k", 1, 3, 3, 64, 64, 8192),
    ):
        q, keys, visible = array(b, k, g, t, h), array(b, k, slots, h), (b, 1, t, slots)
        lse, operations = array(b, k, g, t, dtype="float32"), 2 * b * k * g * t * slots * h
        yield Case(
            config=name, operations=2 * operations,
            function=functools.partial(attend, scale=h**-0.5),
            args=(q, keys, keys, array(*visible, dtype="bool")),
        )  # fmt: skip
        yield Case(
            launch="key_mass", config=name, operations=operations,
            function=functools.partial(key_mass, scale=h**-0.5),
            args=(q, keys, array(*visible, dtype="bool"), lse),
        )  # fmt: skip


@kernel
def weight_matmul() -> Iterator[Case]:
    import jax

    from pallas_kernels.weight_matmul import quantize_weight
    from pallas_kernels.weight_matmul import weight_matmul as multiply

    for name, inputs, outputs, group in (
        ("smollm2 up", 576, 1536, 64),
        ("smollm2 head", 576, 49152, 64),
        ("llama-2 7B up", 4096, 11008, 128),
        ("llama-2 7B down", 11008, 4096, 128),
    ):
        for bits in (4, 8):
            quantize = functools.partial(quantize_weight, bits=bits, group=group)
            weight = jax.eval_shape(quantize, array(outputs, inputs))
            for rows in (1, 16, 64):
                yield Case(
                    config=f"{name}, {bits} bits, {rows} row{'s'[: rows > 1]}",
                    function=multiply, args=(array(rows, inputs), weight),
                    operations=2 * rows * inputs * outputs,
                )  # fmt: skip


@kernel
def kivi_attention() -> Iterator[Case]:
    from pallas_kernels.kivi_attention import kivi_attention as attend

    for name, b, k, g, t, h, slots in (
        ("llama-3 8B, 8 rows, 32k", 8, 8, 4, 1, 128, 32768),
        ("llama-2 7B, 1 row, 4k", 1, 32, 1, 1, 128, 4096),
        ("smollm2, tree of 64, 8k", 1, 3, 3, 64, 64, 8192),
    ):
        for bits in (2, 4, 8):
            yield Case(
                config=f"{name}, {bits} bits", operations=4 * b * k * g * t * slots * h,
                function=functools.partial(
                    attend, key_bits=bits, value_bits=bits, scale=h**-0.5
                ),
                args=(
                    array(b, k, g, t, h), packed(b, k, slots, h, bits, 2),
                    packed(b, k, slots, h, bits, 3), array(b, 1, t, slots, dtype="bool"),
                ),
            )  # fmt: skip


def packed(b: int, k: int, slots: int, h: int, bits: int, axis: int, group: int = 32) -> Any:
    """Keys (axis 2) or values (axis 3) in groups of 32."""
    from pallas_kernels.kivi_attention import PackedHalf

    words, groups = [b, k, slots, h], [b, k, slots, h]
    words[axis] //= 32 // bits
    groups[axis] //= group
    scale = array(*groups, dtype="float16")
    return PackedHalf(array(*words, dtype="uint32"), scale, scale)


@kernel
def quantize_pack() -> Iterator[Case]:
    from pallas_kernels.quantize_pack import quantize_pack as flush

    b, k, h, tokens = 8, 8, 128, 128
    for half, axis in (("keys", 2), ("values", 3)):
        numbers = b * k * h * tokens
        yield Case(
            config=f"llama-3 8B, 8 rows, 128 {half}, 2 bits", operations=8 * numbers,
            function=functools.partial(flush, bits=2, per_channel=axis == 2),
            args=(
                packed(b, k, 32768, h, 2, axis), array(b, k, tokens, h), array(b, 1, dtype="int32"),
            ),
            bytes=numbers * 2 + numbers // 4 + numbers // 32 * 4,
        )  # fmt: skip


@kernel
def sparse_mlp() -> Iterator[Case]:
    from pallas_kernels.sparse_mlp import sparse_mlp as mlp

    for name, d, f in (("smollm2", 576, 1536), ("llama-2 7B", 4096, 11008)):
        for rows in (1, 16):
            for launch in ("sparse_mlp_up", "sparse_mlp_down"):
                weight, blocks = array(f, d), f // 32
                yield Case(
                    launch=launch, config=f"{name}, {rows} row{'s'[: rows > 1]}, all blocks",
                    operations=2 * rows * d * f * (2 if launch.endswith("up") else 1),
                    function=functools.partial(mlp, block_size=32, activation="silu"),
                    args=(
                        array(rows, d), weight, weight, weight, array(blocks, dtype="int32"),
                        array(dtype="int32"),
                    ),
                    bytes=2 * d * f * (2 if launch.endswith("up") else 1),
                )  # fmt: skip


@kernel
def sparse_heads() -> Iterator[Case]:
    from pallas_kernels.sparse_heads import sparse_heads as attend

    b, k, g, h, slots = 8, 8, 4, 128, 8192
    yield Case(
        config="llama-3 8B, 8 rows, 8k, half the groups", operations=4 * b * k // 2 * g * slots * h,
        function=functools.partial(attend, scale=h**-0.5),
        args=(
            array(b, k, g, h), array(b, k, slots, h), array(b, k, slots, h),
            array(b, dtype="int32"), array(b, k // 2, dtype="int32"), array(b, dtype="int32"),
        ),
        bytes=2 * b * k // 2 * slots * h * 2,
    )  # fmt: skip


@kernel
def less_state() -> Iterator[Case]:
    from pallas_kernels.less_state import low_rank_read, low_rank_update

    b, k, g, h, rank, hidden = 8, 32, 1, 128, 8, 512
    state = array(b, k, rank, h, dtype="float32"), array(b, k, rank, dtype="float32")

    def weights(*shapes: tuple[int, ...]) -> tuple[Any, ...]:
        return tuple(array(*shape, dtype="float32") for shape in shapes)

    maps = 2 * b * k * (h * hidden + hidden * rank)
    yield Case(
        launch="low_rank_read", config="llama-2 7B, 8 rows", function=low_rank_read,
        operations=maps + 2 * b * k * rank * h,
        args=(
            array(b, k, g, 1, h), *state, *weights((k * g, h, hidden), (k * g, hidden, rank)),
        ),
    )  # fmt: skip
    yield Case(
        launch="low_rank_update", config="llama-2 7B, 8 rows, 1 token", function=low_rank_update,
        operations=maps + 2 * b * k * (rank * rank + rank * h),
        args=(
            *state, array(b, k, 1, h), array(b, k, 1, h), array(b, dtype="int32"),
            *weights((k, h, hidden), (k, hidden, rank), (k, rank, rank), (k, rank), (k, rank)),
        ),
    )  # fmt: skip


@kernel
def modal_step() -> Iterator[Case]:
    from pallas_kernels.modal_step import hyena_step
    from pallas_kernels.modal_step import modal_step as step

    b, d, k = 64, 4096, 8
    state = (array(b, d, k, dtype="float32"),) * 2
    modes = (*(array(d, k, dtype="float32"),) * 4, array(d, dtype="float32"))
    yield Case(
        config="64 rows, 4096 channels, 8 modes", function=step, operations=12 * b * d * k,
        args=(*state, array(b, d), *modes),
    )  # fmt: skip
    taps = array(3 * d, 3, dtype="float32"), array(3 * d, dtype="float32")
    yield Case(
        launch="hyena_step", config="64 rows, 4096 channels, 8 modes", function=hyena_step,
        operations=b * d * (12 * k + 20),
        args=(array(b, 3 * d), array(b, 3 * d, 2), *taps, *state, *modes),
    )  # fmt: skip


@kernel
def add_norm() -> Iterator[Case]:
    from pallas_kernels.add_norm import add_norm as run

    for name, rows, width in (("smollm2, 1 row", 1, 576), ("llama-2 7B, 64 rows", 64, 4096)):
        yield Case(
            config=name, operations=6 * rows * width,
            function=functools.partial(run, kind="rms", eps=1e-5),
            args=(array(rows, width), array(rows, width), array(width)),
        )  # fmt: skip


@kernel
def merge_splits() -> Iterator[Case]:
    import jax.numpy as jnp

    from pallas_kernels.merge_splits import attend_splits
    from pallas_kernels.merge_splits import merge_splits as merge
    from pallas_kernels.softmax_state import Rest

    for name, b, k, splits, rows, h in (
        ("smollm2, 1 row, 32k", 1, 3, 88, 3, 64),
        ("llama-2 7B, 1 row, 4k", 1, 32, 9, 1, 128),
    ):
        shape = (b, k, splits, rows)
        state = array(*shape, dtype="float32")
        yield Case(
            config=name, operations=2 * math.prod(shape) * h,
            function=functools.partial(merge, interpret=False),
            args=(array(*shape, h, dtype="float32"), state, state),
        )  # fmt: skip
        rest = Rest(array(b, k, rows, 1, 1, dtype="float32"), array(b, k, 1, h))
        yield Case(
            config=name + ", to the output", operations=2 * math.prod(shape) * h,
            function=lambda *args: attend_splits(*args, jnp.bfloat16, interpret=False),
            args=(array(*shape, h, dtype="float32"), state, state, rest),
        )  # fmt: skip


def inspect(name: str, case: Case, target: str, ptxas: str, dumps: Path) -> Row:
    """The row of one case. XLA dumps into the folder `dumps`, which is left empty."""
    import jax

    from jaxinfer.compile.gpu_target import compile_for

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
        from jaxinfer.compile.gpu_target import unavailable_reason

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
    parser.add_argument("--target", default="h200", help="a device of jaxinfer.compile.targets")
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
