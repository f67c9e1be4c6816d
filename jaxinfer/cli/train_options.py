"""Options of every `jaxinfer train`: which texts."""

from pathlib import Path
from typing import Annotated

import typer

from jaxinfer.cli import options as o

TextsOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the texts that tools/data/fetch_texts.py of a source checkout fetches; "
        "left out: where it puts them."
    ),
]
SourceOption = Annotated[
    list[str] | None, typer.Option(help=f"Train on this source only, repeatable: {o.SOURCES}.")
]
