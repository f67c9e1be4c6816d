"""Copy and associative recall on random tokens: what a cache must hold to repeat what it saw.

"copy": n random tokens, then the same again; each token of the second pass is n tokens behind its
first occurrence. "associative": n pairs of a key and a value, then the same pairs in another order;
only values are judged, by how far back their pair was. No tokenizer is needed, and an induction
circuit solves both. Read through the cache, in chunks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxinfer.arguments import shown
from jaxinfer.cache.presets import PolicyLike, resolve
from jaxinfer.decode.model import Model
from jaxinfer.eval.reader import Reader
from jaxinfer.typing import Json

KINDS = ("copy", "associative")


@dataclass(frozen=True)
class Recall:
    """Tokens judged at distances from `distance` up to the next one's; nll in nats."""

    distance: int
    count: int
    nll: float
    accuracy: float


def make_recall(
    kind: str, size: int, rows: int, tokens: Sequence[int], *, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(sequences i32[rows, T], distances i32[rows, T]) of `size` tokens or pairs.

    A distance is 0 where nothing is judged. Tokens are taken from `tokens`, no one twice in the
    first pass where there are enough of them.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {shown(kind)}")
    if size < 2 or rows < 1 or len(tokens) < 4:
        raise ValueError(
            f"expected a size of 2 or more, rows and 4 tokens or more to draw from, got size "
            f"{size}, {rows} rows, {len(tokens)} tokens"
        )
    rng = np.random.default_rng([seed, size])
    pool = np.asarray(tokens, np.int32)
    if kind == "copy":
        first = np.stack([_draw(rng, pool, size) for _ in range(rows)])
        distances = np.full((rows, size), size)
        distances[:, 0] = 0  # nothing tells where the second pass begins
        return np.concatenate([first, first], axis=1), np.concatenate(
            [np.zeros_like(distances), distances], axis=1
        )
    keys, values = pool[: len(pool) // 2], pool[len(pool) // 2 :]
    if size > len(keys):
        raise ValueError(f"{size} pairs need {2 * size} tokens to draw from, got {len(pool)}")
    sequences = np.zeros((rows, 4 * size), np.int32)
    distances = np.zeros((rows, 4 * size), np.int64)
    for row in range(rows):
        pairs = np.stack([_draw(rng, keys, size), _draw(rng, values, size)], axis=1)
        order = rng.permutation(size)
        sequences[row] = np.concatenate([pairs, pairs[order]]).ravel()
        distances[row, 2 * size + 1 :: 2] = 2 * (size + np.arange(size) - order)
    return sequences, distances


def recall(
    lm: Model,
    policy: PolicyLike = None,
    *,
    kind: str = "copy",
    sizes: Sequence[int] = (16, 64, 256),
    rows: int = 8,
    seed: int = 0,
    chunk: int | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[Recall]:
    """The accuracy (is the right token the likeliest?) and nll of the second pass, by distance:
    the size for copies, powers of two for pairs."""
    policy, config = resolve(policy), lm.config
    special = {config.bos_token_id, *config.eos_token_ids}
    tokens = [token for token in range(config.vocab_size) if token not in special]
    judged: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    for index, size in enumerate(sizes):
        sequences, distances = make_recall(kind, size, rows, tokens, seed=seed)
        if config.bos_token_id is not None:
            sequences = np.insert(sequences, 0, config.bos_token_id, axis=1)
            distances = np.insert(distances, 0, 0, axis=1)
        reader = Reader(lm, policy, sequences.shape[1], rows=rows, chunk=chunk)
        found = reader.read(sequences)
        distances = distances[:, 1:]  # the first token is not judged
        if kind == "associative":
            distances = np.where(distances, 2 ** np.log2(np.maximum(distances, 1)).astype(int), 0)
        for distance in np.unique(distances[distances > 0]).tolist():
            here = distances == distance
            judged.setdefault(distance, []).append((found.log_probs[here], found.best[here]))
        report(index + 1, len(sizes))
    out = []
    for distance in sorted(judged):
        log_probs, best = (np.concatenate(x) for x in zip(*judged[distance], strict=True))
        out.append(Recall(distance, len(best), -float(log_probs.mean()), float(best.mean())))
    return out


def recall_metrics(found: Sequence[Recall]) -> Json:
    """What a table shows: accuracy and nll in all, and the accuracy per distance."""
    total = sum(one.count for one in found)
    return {
        "accuracy": sum(one.accuracy * one.count for one in found) / total,
        "nll": sum(one.nll * one.count for one in found) / total,
    } | {f"distance {one.distance}": one.accuracy for one in found}


def _draw(rng: np.random.Generator, pool: np.ndarray, size: int) -> np.ndarray:
    return rng.choice(pool, size, replace=size > len(pool))
