"""Options of every `jaxinfer train`: which texts, and the one that is most like another."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jaxinfer.cli import options as o
from jaxinfer.cli.notices import note

if TYPE_CHECKING:
    from jaxinfer.lm import LM

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
LikeOption = Annotated[
    str | None,
    typer.Option(
        "--like",
        metavar="FILE",
        help="A text such as the model will read: of the sources, train on the nearest "
        "(jaxinfer diagnose --calibration).",
    ),
]
WINDOW, WINDOWS = 256, 8  # of each text that is compared


def sources_for(
    lm: "LM", source: list[str] | None, like: str | None, texts: Path | None
) -> list[str] | None:
    """The sources to train on, None for the usual mixture; with `like` the one that is nearest."""
    if like is None:
        return source or None
    from jaxinfer.cli.text_input import read_text
    from jaxinfer.texts import available_sources
    from jaxinfer.theory.diagnose import nearest_texts
    from jaxinfer.theory.windows import spread_windows
    from jaxinfer.train.windows import MIXTURE, text_windows

    own = spread_windows(lm.encode(read_text(like)), WINDOW, WINDOWS)
    names = source or [name for name in MIXTURE if name in available_sources(texts)]
    windows = {
        name: text_windows(lm.encode, WINDOWS, WINDOW, sources=[name], folder=texts)
        for name in names
    }
    ranked = nearest_texts(lm, own, windows, points=min(own.size // 2, WINDOW))
    for one in ranked:
        note(f"{one.name}: {one.value:.3f} from {like}, p {one.p_value:.3g}")
    return [ranked[0].name]
