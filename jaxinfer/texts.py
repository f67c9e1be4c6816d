"""Text sources on disk and the rule that says which documents are held out of every training run.

`tools/data/fetch_texts.py` writes one `<source>.jsonl.gz` per source, a JSON object per line with
`name`, `source`, `split` and `text`. The held-out rule is binding for the whole project:
nothing is trained on essays by Paul Graham, on Brown files cd* and ck*, on the books of the KJV
after Psalms, or on a tenth of every other source (whole documents, by a hash of the name).
Evaluation reads only those, without the ones that repeat training text (`OVERLAPPING`).
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from jaxinfer.files import cache_folder, one_line, replacing

Split = Literal["train", "heldout", "overlapping"]

# Books whose training is allowed; everything after Psalms is held out.
_KJV_TRAIN_BOOKS = """
Genesis Exodus Leviticus Numbers Deuteronomy Joshua Judges Ruth 1_Samuel 2_Samuel 1_Kings 2_Kings
1_Chronicles 2_Chronicles Ezra Nehemiah Esther Job Psalms
"""
KJV_TRAIN_BOOKS = frozenset(_KJV_TRAIN_BOOKS.split())

# Held-out documents of which more than `overlap.LIMIT` of the words repeat training text: the FAQ's
# appendices quote its sections, asyncio's pages share their headers. Found by
# `tools/data/overlap.py`, which also says when another version of a package has others.
_OVERLAPPING = """
anarchism/append131 anarchism/append134 anarchism/append136 anarchism/secC1 anarchism/secE2
anarchism/secG5 anarchism/secH1 anarchism/secHint brown/cd07 kjv/Isaiah pydoc/howto/regex
pydoc/library/asyncio-future pydoc/library/asyncio-queue pydoc/library/asyncio-stream
pydoc/library/asyncio-subprocess pydoc/library/bdb pydoc/library/heapq
pydoc/library/multiprocessing pydoc/library/sndhdr pydoc/library/zipfile
pydoc/tutorial/controlflow pydoc/tutorial/interpreter
"""
OVERLAPPING = frozenset(_OVERLAPPING.split())


@dataclass(frozen=True)
class Document:
    """One whole document; `name` is unique within its `source`."""

    name: str
    source: str
    split: Split
    text: str


def split_of(source: str, name: str) -> Split:
    """The split a document belongs to; a pure function of its source and name.

    An "overlapping" one is held out of training, and of evaluation too.
    """
    if f"{source}/{name}" in OVERLAPPING:
        return "overlapping"
    if source == "essays":
        return "heldout"
    if source == "brown":
        return "heldout" if name[:2] in ("cd", "ck") else "train"
    if source == "kjv":
        return "train" if name.replace(" ", "_") in KJV_TRAIN_BOOKS else "heldout"
    digest = hashlib.sha256(f"{source}/{name}".encode()).digest()
    return "heldout" if int.from_bytes(digest[:4], "big") % 10 == 0 else "train"


def texts_folder() -> Path:
    """Where fetched texts live, in the user's cache folder."""
    return cache_folder() / "texts"


def write_source(folder: Path, source: str, pairs: Iterable[tuple[str, str]]) -> tuple[Path, int]:
    """Writes (name, text) pairs as one source file, atomically; returns its path and length.

    Documents are sorted by name and no time is recorded: equal texts give equal bytes.
    """
    documents = [
        Document(name, source, split_of(source, name), text.strip() + "\n")
        for name, text in sorted(pairs)
        if text.strip()
    ]
    if not documents:
        raise ValueError(f"source {source!r} has no documents; its archive layout may have changed")
    path = folder / f"{source}.jsonl.gz"
    with (
        replacing(path) as temporary,
        open(temporary, "wb") as raw,
        gzip.GzipFile("", "wb", 6, raw, mtime=0) as file,
    ):
        for document in documents:
            file.write(json.dumps(asdict(document), ensure_ascii=False).encode() + b"\n")
    return path, len(documents)


def read_source(
    source: str, split: Split | None = None, folder: Path | None = None
) -> Iterator[Document]:
    """The documents of one source, in file order; the split is recomputed, never trusted."""
    path = (folder or texts_folder()) / f"{source}.jsonl.gz"
    if not path.is_file():
        raise ValueError(
            f"no texts for {source!r} at {path}; run `python tools/data/fetch_texts.py` first"
        )
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                name, text = str(row["name"]), str(row["text"])
                document = Document(name, source, split_of(source, name), text)
                if split is None or document.split == split:
                    yield document
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged: {one_line(error)}; fetch it again with "
            f"`python tools/data/fetch_texts.py --only {source} --force`"
        ) from error


def available_sources(folder: Path | None = None) -> list[str]:
    """Names of the sources that have been fetched, sorted."""
    folder = folder or texts_folder()
    return sorted(path.name.removesuffix(".jsonl.gz") for path in folder.glob("*.jsonl.gz"))
