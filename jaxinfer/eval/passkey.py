"""A number hidden at a depth of a long text, asked for at its end (the passkey or needle test).

The haystack is filler sentences in random order, the needle one sentence between two of them; both
follow from the seed. Depth 0 is the text's beginning, 1 its end.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxinfer.cache.presets import PolicyLike, resolve
from jaxinfer.decode.model import Model
from jaxinfer.decode.prefix import Prefix
from jaxinfer.eval.choices import check_scoring, is_right
from jaxinfer.typing import Json

DIGITS = 5
FILLER = (
    "The ferry left the harbour before the fog had lifted.",
    "Two gardeners argued about the shade of an old pear tree.",
    "Rain fell on the market, and the bread was sold under a tarpaulin.",
    "A letter arrived that nobody in the house could read.",
    "The clock in the hall had stopped, but it was dusted every week.",
    "Children counted the carriages of the goods train and lost count.",
    "Somebody had painted the gate green and left the brush in the grass.",
    "The baker kept a list of names and never said what it was for.",
    "In winter the road to the mill was open only until noon.",
    "He repaired radios, mostly for people who preferred silence.",
    "The map showed a bridge where there had never been a river.",
    "They sold the piano and kept the stool, which was the better half.",
)
OPENING = "Somewhere in this text a secret number is told. Keep it in mind; it will be asked for."
NEEDLE = "The secret number is {key}. Keep in mind that {key} is the secret number."
QUESTION = "What is the secret number? The secret number is"


@dataclass(frozen=True)
class PasskeyTask:
    """A prompt, its candidate answers (each begins with a space) and the right one's index."""

    prompt: str
    candidates: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class PasskeyCell:
    """`correct` of `samples` found for prompts of about `length` tokens."""

    depth: float
    length: int
    correct: int
    samples: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.samples


def make_passkey(
    lm: Model,
    length: int,
    depth: float,
    *,
    seed: int = 0,
    candidates: int = 10,
    filler: Sequence[str] = FILLER,
) -> PasskeyTask:
    """A prompt of at most `length` tokens (as close as whole sentences come) with its key at
    `depth`; a pure function of its arguments and the tokenizer."""
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must be from 0 (the beginning) to 1 (the end), got {depth}")
    if not 2 <= candidates <= 10**DIGITS // 10 or not filler:
        raise ValueError(f"expected filler and 2 candidates or more, got {candidates} candidates")
    rng = random.Random(f"passkey {length} {depth} {seed}")
    keys = rng.sample(range(10 ** (DIGITS - 1), 10**DIGITS), candidates)
    answer = rng.randrange(candidates)
    needle = NEEDLE.format(key=keys[answer])

    def tokens_of(sentence: str) -> int:
        return len(lm.encode(sentence + " ", continues=True))

    costs = {sentence: tokens_of(sentence) for sentence in filler}
    left = length - sum(map(tokens_of, (OPENING, needle, QUESTION))) - 1
    if left < 0:
        raise ValueError(
            f"a prompt of {length} tokens has no room for the question, which takes {length - left}"
        )
    hay: list[str] = []
    while True:
        order = rng.sample(list(filler), len(filler))
        for sentence in order:
            if costs[sentence] <= left:
                hay.append(sentence)
                left -= costs[sentence]
        if left < min(costs.values()):
            break
    hay.insert(round(depth * len(hay)), needle)
    prompt = " ".join([OPENING, *hay, QUESTION])
    return PasskeyTask(prompt, tuple(f" {key}" for key in keys), answer)


def passkey(
    lm: Model,
    policy: PolicyLike = None,
    *,
    lengths: Sequence[int] = (256, 512, 1024),
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    samples: int = 5,
    scoring: str = "rank",
    seed: int = 0,
    filler: Sequence[str] = FILLER,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[PasskeyCell]:
    """One cell per length and depth; scored by "rank" among ten keys (chance 0.1) or "greedy"."""
    check_scoring(scoring)
    policy, cells = resolve(policy), []
    for length in lengths:
        for depth in depths:
            correct = 0
            for sample in range(samples):
                task = make_passkey(lm, length, depth, seed=seed + sample, filler=filler)
                correct += solve(lm, policy, task, scoring)
            cells.append(PasskeyCell(depth, length, correct, samples))
            report(len(cells), len(lengths) * len(depths))
    return cells


def solve(lm: Model, policy: PolicyLike, task: PasskeyTask, scoring: str = "rank") -> bool:
    """Whether the model finds the key when it has read the prompt through the policy."""
    tokens = lm.encode(task.prompt)
    session = Prefix(lm, resolve(policy), context=len(tokens))
    session.append(tokens)
    return is_right(session, task.candidates, task.answer, scoring)


def passkey_metrics(cells: Sequence[PasskeyCell]) -> Json:
    """What a table shows: the accuracy in all and per length."""
    metrics = {"accuracy": sum(c.correct for c in cells) / sum(c.samples for c in cells)}
    for length in dict.fromkeys(cell.length for cell in cells):
        chosen = [cell for cell in cells if cell.length == length]
        found = sum(c.correct for c in chosen) / sum(c.samples for c in chosen)
        metrics[f"{length} tokens"] = found
    return metrics
