"""Other batches and chunks are other programs: how far they may differ, as the manual says.

docs/quantized_weights.md, "Batches and chunks".
"""

import numpy as np
import pytest

import jaxinfer as ji
from jaxinfer.eval.reader import Reader

LARGEST = {None: 1e-4, "int8": 0.5}  # nats, of a token's log-probability
MEAN = {None: 1e-5, "int8": 0.05}
TEXTS = (
    "The history of the world is the history of a few men who had faith in themselves.",
    "And it came to pass in those days, that there went out a decree from the king of the land.",
    "To write a program is to say to a machine, in order, what it should do and when to stop.",
)


@pytest.mark.parametrize("weights", [None, "int8"])
def test_batches_and_chunks_differ_within_bounds(weights):
    lm = ji.load("tiny-llama", weights=weights)
    rows = [lm.encode(text) for text in TEXTS]
    size = min(map(len, rows))
    tokens = np.asarray([row[:size] for row in rows], np.int32)

    def read(rows: np.ndarray, chunk: int) -> np.ndarray:
        return Reader(lm, ji.full(), size, rows=len(rows), chunk=chunk).read(rows).log_probs

    together = read(tokens, 512)
    alone = np.concatenate([read(row[None], 512) for row in tokens])
    for other in (alone, read(tokens, 1), read(tokens, 8)):
        apart = np.abs(other - together)
        assert apart.max() <= LARGEST[weights] and apart.mean() <= MEAN[weights]


def test_a_row_never_depends_on_its_neighbours():
    lm = ji.load("tiny-llama", weights="int8")
    tokens = np.asarray([lm.encode(TEXTS[0])[:16]] * 2, np.int32)
    other = tokens.copy()
    other[1] = lm.encode(TEXTS[1])[:16]
    first, second = (
        Reader(lm, ji.full(), 16, rows=2, chunk=16).read(rows).log_probs[0]
        for rows in (tokens, other)
    )
    np.testing.assert_array_equal(first, second)
