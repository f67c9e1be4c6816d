"""Sliding-window re-computation: the quality oracle of StreamingLLM (arXiv 2309.17453).

The last L tokens are read anew, without any cache, for every `stride` tokens.
"""

import itertools
import time
from collections.abc import Iterable, Iterator

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxinfer.config import ModelConfig
from jaxinfer.decode.loop import token_log_probs
from jaxinfer.decode.model import Model
from jaxinfer.eval.curve import Averages, Curve, Report
from jaxinfer.eval.documents import regrouped
from jaxinfer.models.stack import forward
from jaxinfer.runtime.program import Program
from jaxinfer.typing import Params

RECOMPUTED_AT_ONCE = 8  # windows per call


def recompute_perplexity(
    lm: Model,
    tokens: Iterable[np.ndarray],
    *,
    window: int,
    stride: int = 1,
    every: int = 2048,
    report: Report = lambda tokens: None,
) -> Curve:
    """Re-computation over a sliding window of `window` tokens that moves by `stride`.

    A token sees between `window - stride` and `window - 1` tokens before it; stride 1 is the oracle
    itself and costs a forward of `window` tokens for each. Its cache bytes are 0: it has none.
    """
    if not 1 <= stride < window:
        raise ValueError(f"stride must be from 1 to window - 1 = {window - 1}, got {stride}")
    if window > lm.config.max_positions:
        raise ValueError(
            f"window {window} exceeds the model's {lm.config.max_positions} positions; shorten it"
        )
    program = lm.engine.programs.setdefault(
        "recompute", Program(_recompute, static_argnames=("cfg", "last"), name="recompute")
    )
    averages, start = Averages(every), time.perf_counter()
    alike = itertools.groupby(_windows(tokens, window, stride), key=lambda w: (w[0].size, w[1]))
    for (size, last), group in alike:
        while rows := list(itertools.islice(group, RECOMPUTED_AT_ONCE)):
            padded = np.zeros((RECOMPUTED_AT_ONCE, size), np.int32)
            padded[: len(rows)] = [row for row, _ in rows]
            found = program(lm.config, lm.params, jnp.asarray(padded), last=last)
            first = 1 if averages.read == 0 else 0  # the stream's first token is not scored
            averages.add(np.asarray(found)[: len(rows)].ravel(), len(rows) * last + first)
            report(averages.read)
    name = f"recompute window={window} stride={stride}"
    return averages.curve(name, 0, time.perf_counter() - start, window, "")


def _recompute(
    cfg: ModelConfig, params: Params, tokens: Int[Array, "B T"], last: int
) -> Float[Array, "B A"]:
    """log p of the `last` tokens of every row, read without a cache."""
    hidden = forward(cfg, params, tokens, logits="none").hidden
    return token_log_probs(cfg, params, hidden[:, -last - 1 : -1], tokens[:, -last:])[0]


def _windows(
    tokens: Iterable[np.ndarray], window: int, stride: int
) -> Iterator[tuple[np.ndarray, int]]:
    """Yields (at most `window` tokens, how many of the last ones are to be scored): a first window
    with all of its tokens, then one per `stride`."""
    held, is_first = np.zeros((0,), np.int32), True
    for piece in regrouped(tokens, stride):
        if is_first and len(held) + len(piece) > window:
            yield held, len(held) - 1
            is_first = False
        held = np.concatenate([held, piece])[-window:]
        if not is_first:
            yield held, len(piece)
    if is_first and len(held) > 1:
        yield held, len(held) - 1
