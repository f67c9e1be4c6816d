"""Perplexity through the cache, with its sampling error.

Every block is scored by `LM.score`: what has been read is committed, so a policy's own losses count
as they do in decoding. The confidence interval is a bootstrap over blocks (percentile method:
blocks are drawn with replacement and each draw's token-weighted mean is kept), because tokens of
one text are not independent.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxinfer.cache.presets import PolicyLike, resolve
from jaxinfer.decode.model import Prompt
from jaxinfer.eval.documents import blocks
from jaxinfer.eval.memory import bytes_per_token
from jaxinfer.lm import LM
from jaxinfer.typing import Json

DRAWS = 2000


@dataclass(frozen=True)
class Perplexity:
    """`nll` in nats per token, `nll_interval` its 95 % interval. `cache_bytes` is what was
    allocated for the longest block, `bytes_per_token` what the policy needs for it per token."""

    policy: str
    tokens: int
    blocks: int
    nll: float
    nll_interval: tuple[float, float]
    cache_bytes: int
    bytes_per_token: float

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nll, 700.0))

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the perplexity."""
        low, high = (math.exp(min(bound, 700.0)) for bound in self.nll_interval)
        return low, high

    def metrics(self) -> Json:
        """What a table shows."""
        low, high = self.interval
        return {
            "tokens": self.tokens,
            "nll": self.nll,
            "perplexity": self.perplexity,
            "low": low,
            "high": high,
        }


def perplexity(
    lm: LM,
    texts: Sequence[Prompt],
    policy: PolicyLike = None,
    *,
    context: int | None = None,
    chunk: int | None = None,
    seed: int = 0,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Perplexity:
    """The perplexity of texts (or token lists), each cut into blocks of `context` tokens that do
    not see each other (None: whole texts). `report(done, total)` counts blocks."""
    if context is not None and context < 2:
        raise ValueError(f"context must be at least 2 tokens, got {context}")
    policy = resolve(policy)
    rows = [block for text in texts for block in blocks(lm.encode(text), context)]
    if not rows:
        raise ValueError("nothing to score: no text has 2 tokens or more")
    sums, counts, cache_bytes = [], [], 0
    for index, row in enumerate(rows):
        (score,) = lm.score([row], policy=policy, chunk=chunk)
        sums.append(-math.fsum(score.log_probs))
        counts.append(len(score.log_probs))
        cache_bytes = max(cache_bytes, score.cache_bytes)
        report(index + 1, len(rows))
    longest = max(map(len, rows))
    return Perplexity(
        policy=policy.name,
        tokens=sum(counts),
        blocks=len(rows),
        nll=math.fsum(sums) / sum(counts),
        nll_interval=bootstrap_interval(sums, counts, seed=seed),
        cache_bytes=cache_bytes,
        bytes_per_token=bytes_per_token(lm, policy, longest),
    )


def bootstrap_interval(
    sums: Sequence[float],
    counts: Sequence[int],
    *,
    seed: int = 0,
    draws: int = DRAWS,
    level: float = 0.95,
) -> tuple[float, float]:
    """The interval of sum(sums) / sum(counts) when the groups are drawn anew; with one group the
    interval is as wide as what is known about it: (nan, nan)."""
    if len(sums) < 2:
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    picked = rng.integers(0, len(sums), (draws, len(sums)))
    means = np.asarray(sums)[picked].sum(axis=1) / np.asarray(counts)[picked].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
