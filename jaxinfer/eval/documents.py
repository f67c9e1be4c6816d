"""Texts to evaluate on: whole documents, blocks of tokens, and one long stream of them.

Only held-out documents are read (see `jaxinfer.texts`): nothing here was ever trained on by
this project's own tools.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from jaxinfer.arguments import shown
from jaxinfer.decode.model import Model, Prompt
from jaxinfer.texts import read_source

DEFAULT_SOURCE = "essays"


def held_out_texts(
    source: str = DEFAULT_SOURCE, count: int | None = None, folder: Path | None = None
) -> list[str]:
    """The texts of a source's first `count` held-out documents, in file order."""
    documents = itertools.islice(read_source(source, "heldout", folder), count)
    texts = [document.text for document in documents]
    if not texts:
        raise ValueError(f"source {shown(source)} has no held-out document; name another source")
    return texts


def document_rows(lm: Model, texts: Iterable[Prompt], count: int, tokens: int) -> np.ndarray:
    """i32[N, T]: the first `tokens` tokens of the first `count` texts that have so many.

    Raises:
      ValueError: no text has.
    """
    encoded = (lm.encode(text)[:tokens] for text in texts)
    rows = list(itertools.islice((row for row in encoded if len(row) == tokens), count))
    if not rows:
        raise ValueError(f"no text has {tokens} tokens; take longer texts or fewer tokens")
    return np.asarray(rows, np.int32)


def token_stream(
    lm: Model, texts: Iterable[Prompt], limit: int | None = None, *, repeat: bool = False
) -> Iterator[np.ndarray]:
    """Yields i32[T], the tokens of one text after another, `limit` in all; only the first text
    begins with the model's BOS. With `repeat` the texts start again when they end, for ever if
    there is no limit."""
    if repeat:
        texts = itertools.cycle(list(texts))
    left = limit
    for index, text in enumerate(texts):
        if left is not None and left <= 0:
            return
        tokens = np.asarray(lm.encode(text, continues=index > 0), np.int32)[:left]
        left = None if left is None else left - len(tokens)
        yield tokens


def regrouped(arrays: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Yields the same tokens in pieces of `size`, the last one shorter."""
    held: list[np.ndarray] = []
    count = 0
    for array in arrays:
        while count + len(array) >= size:
            head, array = np.split(array, [size - count])
            yield np.concatenate([*held, head])
            held, count = [], 0
        held.append(array)
        count += len(array)
    if count:
        yield np.concatenate(held)


def blocks(tokens: Sequence[int], size: int | None) -> list[list[int]]:
    """A document in blocks of `size` tokens (None: whole); a rest below 2 tokens is left out."""
    size = size or max(len(tokens), 1)
    cut = [list(tokens[i : i + size]) for i in range(0, len(tokens), size)]
    return [block for block in cut if len(block) >= 2]
