"""How a session would go on: known continuations compared by log-probability, none of them kept.

Ranking candidates is the score for models too small to write an answer; `greedy_match` is the one
for models that can, and equals exact match of greedy generation. A continuation is read in one
piece: within it nothing is evicted or quantised.
"""

from collections.abc import Sequence

import numpy as np

from jaxinfer.arguments import shown
from jaxinfer.decode.model import Prompt
from jaxinfer.decode.prefix import Prefix
from jaxinfer.decode.scoring import Reading, peek

SCORING = ("rank", "greedy")


def candidate_log_probs(session: Prefix, candidates: Sequence[Prompt]) -> list[float]:
    """log p (nats) of each candidate, text or tokens, after what the session has read."""
    return [float(_read(session, one).log_probs.sum()) for one in candidates]


def best_candidate(session: Prefix, candidates: Sequence[Prompt]) -> int:
    """The index of the likeliest candidate; they should be about equally long."""
    return int(np.argmax(candidate_log_probs(session, candidates)))


def greedy_match(session: Prefix, answer: Prompt) -> bool:
    """Whether greedy decoding would write `answer` next."""
    return bool(_read(session, answer).best.all())


def is_right(session: Prefix, candidates: Sequence[Prompt], answer: int, scoring: str) -> bool:
    """Whether the model picks `candidates[answer]`: by "rank" among them, or "greedy"."""
    if scoring == "rank":
        return best_candidate(session, candidates) == answer
    return greedy_match(session, candidates[answer])


def check_scoring(scoring: str) -> None:
    """Refuses an unknown way of scoring."""
    if scoring not in SCORING:
        raise ValueError(f"scoring must be one of {', '.join(SCORING)}, got {shown(scoring)}")


def _read(session: Prefix, candidate: Prompt) -> Reading:
    tokens = session.model.encode(candidate, continues=True)
    if not tokens or not session.pending:
        raise ValueError(
            "a continuation needs at least 1 token before and in it; append a prompt first"
        )
    # Several pending tokens cannot be: a session keeps one outside its cache.
    return peek(session.engine, session.cache, session.pending[-1], tokens)
