"""Retrieval from a stream of lines, in the manner of StreamEval (arXiv 2309.17453, section 4.4).

Each line tells a number; every `every` lines a question asks for the number of the line d lines
back. Lines, questions and the right answers go through one session, so the stream may be longer
than any context: what counts is whether the answer's line is still in the cache. The right answer
is what the stream goes on with, whatever the model said.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from jaxinfer.cache.presets import PolicyLike
from jaxinfer.eval.choices import check_scoring, is_right
from jaxinfer.lm import LM
from jaxinfer.typing import Json

LINE = "Line {line}: the drawer holds {number} coins.\n"
QUESTION = "How many coins does the drawer of line {line} hold? It holds"
ANSWER = " {number}"
AFTER = " coins.\n"


@dataclass(frozen=True)
class Query:
    """A question behind `lines` lines of text, about the line `distance` lines back."""

    text: str  # the lines since the query before
    question: str
    candidates: tuple[str, ...]
    answer: int
    distance: int


@dataclass(frozen=True)
class LineAccuracy:
    """`correct` of `queries` whose answer is `distance` lines, `tokens` tokens on average, back."""

    distance: int
    tokens: float
    correct: int
    queries: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.queries


def make_queries(
    lines: int,
    distances: Sequence[int],
    *,
    every: int = 10,
    candidates: int = 10,
    seed: int = 0,
) -> Iterator[Query]:
    """Yields the queries of a stream of `lines` lines; they take the distances in turn, as far as
    the stream reaches back. Wrong candidates are numbers of other lines where there are enough."""
    if lines < 1 or every < 1 or candidates < 2 or not distances or min(distances) < 0:
        raise ValueError(
            "expected lines and every of 1 or more, candidates of 2 or more and distances of 0 or "
            f"more, got {lines}, {every}, {candidates} and {list(distances)}"
        )
    rng = random.Random(f"lines {seed}")
    numbers: list[int] = []  # of the last lines, as many as a query can ask about
    reach = max(*distances, candidates) + 1
    text, asked = "", 0
    for line in range(1, lines + 1):
        numbers = [*numbers[1 - reach :], rng.randrange(1000, 10000)]
        text += LINE.format(line=line, number=numbers[-1])
        distance = distances[asked % len(distances)]
        if line % every or distance >= len(numbers):
            continue
        right = numbers[-1 - distance]
        others = sorted(set(numbers) - {right})
        missing = candidates - 1 - len(others)
        pool = [n for n in range(1000, 10000) if n != right and n not in others]
        others += rng.sample(pool, max(missing, 0))
        options = [right, *rng.sample(others, candidates - 1)]
        rng.shuffle(options)
        yield Query(
            text=text,
            question=QUESTION.format(line=line - distance),
            candidates=tuple(ANSWER.format(number=n) for n in options),
            answer=options.index(right),
            distance=distance,
        )
        text, asked = "", asked + 1


def line_retrieval(
    lm: LM,
    policy: PolicyLike = None,
    *,
    lines: int = 100,
    distances: Sequence[int] = (1, 5, 10, 20, 40, 80),
    every: int = 10,
    scoring: str = "rank",
    seed: int = 0,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[LineAccuracy]:
    """The accuracy by distance; scored by "rank" among ten numbers (chance 0.1) or "greedy"."""
    check_scoring(scoring)
    session = lm.session(policy)
    right: dict[int, list[bool]] = {}
    spans: dict[int, list[float]] = {}
    queries = list(make_queries(lines, distances, every=every, seed=seed))
    if not queries:
        raise ValueError(
            f"{lines} lines have no query: every {every} lines one whose answer is "
            f"{min(distances)} or more lines back; take more lines or smaller distances"
        )
    texts = [query.text + query.question for query in queries]
    encoded = [session.encode(texts[0])]
    encoded += [lm.encode(AFTER + text, continues=True) for text in texts[1:]]
    answers = [lm.encode(query.candidates[query.answer], continues=True) for query in queries]
    # All of a growing cache at once: every doubling would compile anew.
    session.reserve(sum(map(len, encoded + answers)))
    told: list[int] = []  # the answer to the query before
    for index, query in enumerate(queries):
        session.append(told + encoded[index])
        right.setdefault(query.distance, []).append(
            is_right(session, query.candidates, query.answer, scoring)
        )
        per_line = len(encoded[index]) / every
        spans.setdefault(query.distance, []).append(per_line * (query.distance + 1))
        told = answers[index]
        report(index + 1, len(queries))
    return [
        LineAccuracy(
            distance,
            sum(spans[distance]) / len(spans[distance]),
            sum(right[distance]),
            len(right[distance]),
        )
        for distance in sorted(right)
    ]


def line_metrics(found: Sequence[LineAccuracy]) -> Json:
    """What a table shows: the accuracy in all and per distance."""
    total = sum(one.correct for one in found) / sum(one.queries for one in found)
    return {"accuracy": total} | {f"{one.distance} lines": one.accuracy for one in found}
