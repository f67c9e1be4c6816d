"""Windows of training text for what learns from a frozen model: LESS's feature maps, drafts."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from jaxinfer.texts import Split, available_sources, read_source

# How often a window is taken from each source, relative to the others; mostly prose.
MIXTURE = {"anarchism": 3, "brown": 4, "kjv": 1, "devil": 1, "pydoc": 2}
SKIPPED_PREFIXES = ("library/", "using/", "extending/")  # pages of reference lists
CHARACTERS_PER_TOKEN = 10  # more than any text needs


def text_windows(
    encode: Callable[[str], Sequence[int]],
    sequences: int,
    context: int,
    *,
    seed: int = 0,
    sources: Sequence[str] | None = None,
    folder: Path | None = None,
    split: Split = "train",
) -> np.ndarray:
    """i32[Q, T]: windows from random places of the training texts (or those of another
    split), each begun at a word."""
    names = sources or [name for name in MIXTURE if name in available_sources(folder)]
    if not names:
        raise ValueError("no texts found; run `python tools/data/fetch_texts.py` first")
    texts = [
        "\n".join(
            document.text
            for document in read_source(name, split, folder)
            if not document.name.startswith(SKIPPED_PREFIXES)
        )
        for name in names
    ]
    generator = np.random.default_rng(seed)
    weights = np.array([MIXTURE.get(name, 1) for name in names], float)
    rows, span = [], CHARACTERS_PER_TOKEN * context
    for _ in range(50 * sequences):
        text = texts[generator.choice(len(texts), p=weights / weights.sum())]
        place = int(generator.integers(max(1, len(text) - span)))
        piece = text[place : place + span].split(maxsplit=1)[-1]
        tokens = encode(piece)[:context]
        if len(tokens) == context:
            rows.append(tokens)
        if len(rows) == sequences:
            return np.asarray(rows, np.int32)
    raise ValueError(f"the texts are too short for windows of {context} tokens; lower the context")
