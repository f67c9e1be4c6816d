"""Seconds of a round of continuous batching in a pipeline: of prompts, or a step of all rows."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from jaxinfer.parallel.hexgen.costs import Costs
from jaxinfer.parallel.hexgen.layouts import Stage


class RoundTimes:
    """The stages of a replica as rounds see them."""

    def __init__(self, costs: Costs, stages: tuple[Stage, ...]):
        one_row = dataclasses.replace(costs.assumptions, batch=1)
        self.costs, self.stages = dataclasses.replace(costs, assumptions=one_row), stages
        # A step of r rows with c tokens takes fixed + r (per_row + c per_token) in each stage:
        # three steps tell the numbers.
        one, two_rows, two_tokens = self._steps(((1, 0), (2, 0), (1, 1)))
        self._per_row, self._per_token = two_rows - one, two_tokens - one
        self._fixed = one - self._per_row
        self._hop = self._hops()

    def fits(self, tokens: int) -> bool:
        """Whether a row of so many tokens fits into an empty replica."""
        return bool((self.row_share(tokens) <= 1).all())

    @functools.lru_cache(maxsize=4096)  # noqa: B019 (lives as long as a simulation)
    def row_share(self, tokens: int) -> NDArray[np.float64]:
        """[stage] part of the memory for caches that a row of so many tokens takes."""
        last = len(self.stages) - 1
        shares = [
            self.costs.row_share(*one, i == 0, i == last, tokens)
            for i, one in enumerate(self.stages)
        ]
        return np.array(shares, float)

    def prompt_s(self, length: int) -> float:
        """Seconds in which a prompt alone is read."""
        return self.prompts([length])[0][0]

    def prompts(self, lengths: Sequence[int]) -> tuple[list[float], list[float]]:
        """When each of some prompts is read, one behind the other, and how long stages work."""
        free, busy, ends = [0.0] * len(self.stages), [0.0] * len(self.stages), []
        for length in lengths:
            time = 0.0
            for s, (hold, hop) in enumerate(self._prompt(length)):
                free[s] = max(time, free[s]) + hold
                busy[s] += hold
                time = free[s] + hop
            ends.append(time)
        return ends, busy

    def step(self, rows: int, context: float) -> tuple[float, list[float]]:
        """Seconds of a step of rows with `context` tokens on average, and of each stage's work."""
        parts = min(len(self.stages), rows)
        each = math.ceil(rows / parts)
        times = self._fixed + each * (self._per_row + self._per_token * context)
        fixed, per_row = self._hop
        through = float(times.sum()) + fixed + each * per_row
        return max(through, parts * float(times.max())), (parts * times).tolist()

    @functools.lru_cache(maxsize=4096)  # noqa: B019
    def _prompt(self, length: int) -> list[tuple[float, float]]:
        """Every stage's seconds, and those of the hop behind it."""
        found = []
        for i, (m, n, layers) in enumerate(self.stages):
            is_last = i + 1 == len(self.stages)
            hold = self.costs.prefill_s(m, n, layers, length)
            hold = hold + self.costs.ends_s(m, n, length, is_last)
            hop = 0.0 if is_last else self.costs.hop_s(m, self.stages[i + 1].machine, length)
            found.append((float(hold), float(hop)))
        return found

    def _steps(self, kinds: Sequence[tuple[int, int]]) -> NDArray[np.float64]:
        """[kind, stage] seconds of steps of (rows, context)."""
        last = len(self.stages) - 1
        return np.array([
            [
                self.costs.decode_s(m, n, layers, context, rows)
                + self.costs.ends_s(m, n, rows, i == last)
                for i, (m, n, layers) in enumerate(self.stages)
            ]
            for rows, context in kinds
        ])  # fmt: skip

    def _hops(self) -> tuple[float, float]:
        """Seconds of all hops and of the way back for one more step, and more for each row."""
        pairs = zip(self.stages, self.stages[1:], strict=False)
        hops = [
            [float(self.costs.hop_s(one.machine, other.machine, rows)) for rows in (0, 1)]
            for one, other in pairs
        ]
        fixed, one = np.array(hops, float).reshape(-1, 2).sum(0)
        back = 0.0
        if len(self.stages) > 1:
            back = float(self.costs.back_s(self.stages[-1].machine, self.stages[0].machine, 2))
        return float(fixed) + back, float(one - fixed)
