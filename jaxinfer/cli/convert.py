"""`jaxinfer convert`: any checkpoint we read, to a folder of our own format."""

from typing import Annotated

import typer

from jaxinfer.cli import options as o
from jaxinfer.cli.interrupts import finishing


@finishing()
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help=o.MODELS)],
    destination: Annotated[str, typer.Argument(metavar="DST", help="A new or empty folder.")],
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32 (default), bfloat16 or float16.")
    ] = None,
    int8_rows: Annotated[
        bool,
        typer.Option("--int8-rows", help="Round matrices to 8 bits: a byte per parameter."),
    ] = False,
    force: o.ForceOption = False,
    as_json: o.JsonOption = False,
) -> None:
    """Write a model to a folder that loads fast.

    Nothing half-written is left behind.
    """
    from jaxinfer.io.convert import convert as run
    from jaxinfer.progress import progress

    if not destination.strip() or "\0" in destination:
        raise ValueError(f"the destination must be a folder, got {destination!r}")
    with progress(f"converting {source}") as report:
        folder = run(
            source, destination, dtype=dtype, int8_rows=int8_rows, overwrite=force, progress=report
        )
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if as_json:
        o.print_json({"source": source, "folder": str(folder), "bytes": size})
    else:
        print(f"wrote {folder} ({size / 1e6:.1f} MB)")
