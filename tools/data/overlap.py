"""How much of every held-out document repeats training text, by shared runs of 13 words.

    python tools/data/overlap.py [--folder DIR]

A word of a held-out document overlaps if it lies in a run of 13 words, case and punctuation aside,
that some training document of any fetched source holds as well (the rule of arXiv 2005.14165,
appendix C). Documents of which more than 2 % overlaps belong into `OVERLAPPING` of
`jaxinfer.texts`, which evaluation leaves out; the command exits with 1 if that list and the texts
disagree.
"""

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from jaxinfer.texts import OVERLAPPING, Document, available_sources, read_source

RUN = 13
LIMIT = 0.02
_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """The words of a text in lower case."""
    return _WORD.findall(text.lower())


def runs(found: Sequence[str]) -> list[int]:
    """A hash of every run of `RUN` words, by the place of its first word."""
    return [hash(tuple(found[i : i + RUN])) for i in range(len(found) - RUN + 1)]


def shared(text: str, training: set[int]) -> float:
    """The share of the words of `text` that lie in a run of `training`."""
    found = words(text)
    covered = 0
    end = 0  # words before it are counted
    for start, run in enumerate(runs(found)):
        if run in training:
            covered += start + RUN - max(start, end)
            end = start + RUN
    return covered / max(len(found), 1)


def overlaps(documents: Iterable[Document]) -> dict[str, float]:
    """By "source/name", the shared part of every document that is held out of training."""
    documents = list(documents)
    training = {run for d in documents if d.split == "train" for run in runs(words(d.text))}
    return {
        f"{d.source}/{d.name}": shared(d.text, training) for d in documents if d.split != "train"
    }


def disagreement(folder: Path | None = None) -> set[str]:
    """Documents that overlap and are not listed as such, or the other way round."""
    found = _of_texts(folder)
    return {name for name, part in found.items() if part > LIMIT} ^ (OVERLAPPING & set(found))


def _of_texts(folder: Path | None) -> dict[str, float]:
    return overlaps(
        d for source in available_sources(folder) for d in read_source(source, None, folder)
    )


def main(
    folder: Annotated[Path | None, typer.Option(help="Where the texts are.")] = None,
) -> None:
    """Prints the shared part of held-out documents, largest first."""
    found = _of_texts(folder)
    for name, part in sorted(found.items(), key=lambda item: -item[1]):
        if part > LIMIT or name in OVERLAPPING:
            typer.echo(f"{name}: {100 * part:.1f} %")
    wrong = sorted(disagreement(folder))
    if wrong:
        typer.echo(f"OVERLAPPING of jaxinfer/texts.py is wrong about {', '.join(wrong)}", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
