"""Perplexity of one long token stream, as a curve (StreamingLLM, arXiv 2309.17453, section 4.1).

The stream is read through one cache. A policy whose memory is fixed goes on for 2^31 tokens
(positions are int32); one whose cache grows stops, and says so, at its limit. Tokens arrive as an
iterator, so neither the host nor the device holds more than a piece of them.
"""

import time
from collections.abc import Iterable

import numpy as np

from jaxinfer.cache.policy import Policy
from jaxinfer.cache.presets import PolicyLike, resolve
from jaxinfer.decode.capacity import is_endless
from jaxinfer.decode.model import Model
from jaxinfer.eval.curve import Averages, Curve, Report
from jaxinfer.eval.documents import regrouped
from jaxinfer.eval.reader import Reader
from jaxinfer.models.reach import reach

LONGEST = 2**31 - 2**16  # tokens; positions of the last, padded chunk must fit into an int32


def check_endless(policy: Policy) -> None:
    """Refuses a policy whose memory or positions grow with the text, whatever the model."""
    if policy.endless:
        return
    why = "it counts positions in the text" if policy.fixed_size else "its memory grows with it"
    raise ValueError(
        f"policy {policy.name!r} cannot read a stream of any length: {why}; choose streaming with "
        "positions='in_cache' (in every layer), or give a limit of tokens"
    )


def stream_perplexity(
    lm: Model,
    tokens: Iterable[np.ndarray],
    policy: PolicyLike = None,
    *,
    every: int = 2048,
    chunk: int | None = None,
    limit: int | None = None,
    report: Report = lambda tokens: None,
) -> Curve:
    """Reads arrays i32[T] of a stream through one cache; a point per `every` tokens.

    `limit` is the most tokens that a growing cache may hold (default: the model's positions); a
    policy of fixed memory needs none and stops there only if it is given. Past the model's
    positions a full cache is the "dense" baseline of the paper, `streaming(sinks=0)` is "window".
    """
    policy = resolve(policy)
    most = lm.config.max_positions
    end = limit if limit is not None else LONGEST if is_endless(lm, policy) else most
    end = min(end, reach(lm.config) or LONGEST)
    reader = Reader(lm, policy, most, chunk=chunk)
    averages, start, stopped, largest = Averages(every), time.perf_counter(), "", 0
    for piece in regrouped(tokens, reader.chunk):
        left = end - averages.read
        try:
            found = reader.read(piece[None, :left]).log_probs[0] if left != 0 else None
        except ValueError as error:  # no room for a larger cache
            if not averages.read:
                raise
            stopped = f"after {averages.read} tokens: {error}"
            break
        if found is not None:
            averages.add(found, len(piece[:left]))
            largest = max(largest, reader.cache_bytes)
            report(averages.read)
        if left < len(piece):
            whose = "int32 positions" if end == LONGEST else f"policy {policy.name!r}"
            stopped = f"after {averages.read} tokens: the limit of {whose}"
            break
    return averages.curve(policy.name, largest, time.perf_counter() - start, reader.chunk, stopped)
