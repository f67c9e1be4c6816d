"""Convert a Hugging Face folder or a GGUF file to a folder that jaxinfer loads fast.

    python tools/convert_hf.py SRC DST --dtype bfloat16

The same code as `jaxinfer convert`.
"""

from pathlib import Path
from typing import Annotated

import typer


def main(
    src: Annotated[str, typer.Argument(help="Hugging Face folder, GGUF file or model name.")],
    dst: Annotated[Path, typer.Argument(help="New folder.")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Convert SRC to the folder DST."""
    from rich.console import Console
    from rich.progress import Progress

    from jaxinfer.io.convert import convert

    console = Console(stderr=True)
    try:
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task("converting")
            folder = convert(
                src,
                dst,
                dtype=dtype,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(str(folder))


if __name__ == "__main__":
    typer.run(main)
