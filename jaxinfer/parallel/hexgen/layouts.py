"""The best pipelines of one group of accelerators: an exact dynamic programme.

HexGen (arXiv 2311.11514, section 4.1): the accelerators of a machine are interchangeable, so that
the state is how many of each machine are free, how many layers remain, and where the stage before
ran. A stage takes some accelerators of one machine and some layers; all sequences of stages
are searched, each with all ways to split the layers.

With r remaining layers, n free accelerators and a stage on machine m that takes t of them and x
layers, the best latency is

    f(r, n, m) = min over t, x, m' of
                 stage(m, t) + x layer(m, t) + hop(m, m') + f(r - x, n - t, m')

and for the bottleneck the sum of a stage and the rest is their maximum. NumPy takes the minimum
over x and m' for every r at once. The frontier of both is found by the latency under ever
smaller limits of the bottleneck.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Objective = Literal["latency", "bottleneck"]
Counts = tuple[int, ...]
"""Accelerators per machine."""

STRICTLY = 1 - 1e-9  # of the last bottleneck is the next limit of the frontier


class Stage(NamedTuple):
    """`layers` layers with tensor parallelism `degree` on one machine."""

    machine: int
    degree: int
    layers: int


@dataclass(frozen=True)
class Layout:
    """A pipeline. `latency_s` is the time of a request alone; `bottleneck_s`, that of the slowest
    stage with its hop, is the time between two requests under load."""

    stages: tuple[Stage, ...]
    latency_s: float
    bottleneck_s: float


@dataclass(frozen=True)
class StageTable:
    """Seconds and limits of every stage that machine M can form with the degree of index T.

    `back_s[i, j]` is what tokens take from a last stage on machine i to a first one on machine j.
    """

    degrees: tuple[int, ...]
    layer_s: NDArray[np.float64]  # [M, T] of each layer
    stage_s: NDArray[np.float64]  # [M, T] of the stage beside its layers
    last_s: NDArray[np.float64]  # [M, T] more of the last stage
    caps: NDArray[np.int64]  # [M, T, is first, is last] most layers
    hop_s: NDArray[np.float64]  # [M, M] of a request from stage to stage
    back_s: NDArray[np.float64]  # [M, M]

    def layout(self, stages: tuple[Stage, ...]) -> Layout:
        """The latency and bottleneck of a pipeline; it may exceed the caps."""
        times = []
        for i, stage in enumerate(stages):
            m, t = stage.machine, self.degrees.index(stage.degree)
            time = self.stage_s[m, t] + stage.layers * self.layer_s[m, t]
            if i + 1 == len(stages):
                time += self.last_s[m, t]
            else:
                time += self.hop_s[m, stages[i + 1].machine]
            times.append(float(time))
        back = 0.0
        if len(stages) > 1:
            back = float(self.back_s[stages[-1].machine, stages[0].machine])
        return Layout(stages, sum(times) + back, max(times))

    def is_within(self, stages: tuple[Stage, ...]) -> bool:
        """Whether every stage has memory for its layers."""
        ends = range(len(stages))
        return all(
            stage.layers <= self.caps[stage.machine, self.degrees.index(stage.degree)][
                int(i == 0), int(i == ends[-1])
            ]
            for i, stage in enumerate(stages)
        )  # fmt: skip


def best_layout(
    table: StageTable,
    counts: Counts,
    layers: int,
    objective: Objective = "latency",
    *,
    limit_s: float = np.inf,
    use_all: bool = False,
) -> Layout | None:
    """The pipeline of least latency or of least bottleneck; None where no pipeline fits.

    Args:
        table: the times of the stages.
        counts: accelerators of each machine that may be used.
        layers: of the model.
        objective: of bottlenecks that are equal, the one of less latency is taken.
        limit_s: no stage with its hop may take longer.
        use_all: whether every accelerator has to be used.
    """
    if not any(counts):
        return None
    backs = np.unique(table.back_s) if objective == "latency" else np.zeros(1)
    firsts = [None] if len(backs) == 1 and backs[0] == 0 else _present(counts)
    found = []
    for first in firsts:
        search = _Search(table, counts, layers, objective, limit_s, use_all, first)
        stages = search.stages()
        if stages is not None:
            found.append(table.layout(stages))
    if not found:
        return None
    if objective == "latency":
        return min(found, key=lambda one: one.latency_s)
    limit = min(one.bottleneck_s for one in found) * (1 + 1e-12)
    return best_layout(table, counts, layers, limit_s=limit, use_all=use_all)


def frontier(
    table: StageTable, counts: Counts, layers: int, *, use_all: bool = False
) -> list[Layout]:
    """All pairs of latency and bottleneck of which no other is better in both, a layout for each,
    from the least latency to the least bottleneck."""
    found: list[Layout] = []
    limit = np.inf
    while True:
        one = best_layout(table, counts, layers, limit_s=limit, use_all=use_all)
        if one is None:
            return found
        if found and one.latency_s <= found[-1].latency_s * (1 + 1e-12):
            found.pop()  # as fast, with a worse bottleneck
        found.append(one)
        limit = one.bottleneck_s * STRICTLY


def symmetric_layout(
    table: StageTable, counts: Counts, layers: int, objective: Objective = "latency"
) -> Layout | None:
    """The best pipeline whose stages all have the same degree and, but for one, the same layers.

    This is what serving without asymmetric parallelism does; every order of machines is tried.
    """
    found = []
    for degree in table.degrees:
        stages_of = [count // degree for count in counts]
        for used in itertools.product(*(range(n + 1) for n in stages_of)):
            total = sum(used)
            if not 0 < total <= layers:
                continue
            share, more = divmod(layers, total)
            for order in itertools.permutations(m for m, n in enumerate(used) if n):
                machines = [m for m in order for _ in range(used[m])]
                stages = tuple(Stage(m, degree, share + (i < more)) for i, m in enumerate(machines))
                if table.is_within(stages):
                    found.append(table.layout(stages))
    key = {"latency": lambda one: one.latency_s, "bottleneck": lambda one: one.bottleneck_s}
    return min(found, key=key[objective], default=None)


def _present(counts: Counts) -> list[int]:
    return [machine for machine, count in enumerate(counts) if count]


@dataclass(frozen=True)
class _Search:
    """The programme for one group; with `first`, pipelines that begin on that machine."""

    table: StageTable
    counts: Counts
    layers: int
    objective: Objective
    limit_s: float
    use_all: bool
    first: int | None

    @cached_property
    def machines(self) -> list[int]:
        """Those that have accelerators; only they have an axis in a state."""
        return _present(self.counts)

    def stages(self) -> tuple[Stage, ...] | None:
        """The best pipeline, found by following the best choices from the first stage on."""
        values = self._values()
        free = tuple(self.counts[m] for m in self.machines)
        firsts = range(len(self.machines))
        if self.first is not None:
            firsts = [self.machines.index(self.first)]
        best, machine, layers, is_first = np.inf, -1, self.layers, True
        for i in firsts:
            value, _ = min(self._choices(values, free, i, layers, True), default=(np.inf, None))
            if value < best:
                best, machine = value, i
        found = []
        while machine >= 0:
            _, (stage, free, following) = min(
                self._choices(values, free, machine, layers, is_first)
            )
            found.append(stage)
            machine, layers, is_first = following, layers - stage.layers, False
        return tuple(found) or None

    def _values(self) -> dict[Counts, NDArray[np.float64]]:
        """[machine of the next stage, layers that remain] for every count of free accelerators."""
        values, padded = {}, {}  # padded: behind as many that cannot be, so that windows of it are
        count = len(self.machines)  # what follows a stage, for all numbers of layers that it takes
        for free in itertools.product(*(range(self.counts[m] + 1) for m in self.machines)):
            here = np.full((count, self.layers + 1), np.inf)
            for i, t, n in self._takes(free):
                rest = tuple(left - n * (j == i) for j, left in enumerate(free))
                terms, ends = self._inner[i, t]
                windows = sliding_window_view(padded[rest], self.layers, -1)[:, :-1]
                total = self._joined(windows, terms[:, None, ::-1]).min(axis=(0, 2))
                here[i] = np.minimum(here[i], total)
                if not (self.use_all and any(rest)):
                    here[i] = np.minimum(here[i], ends)
            values[free] = here
            padded[free] = np.hstack([np.full((count, self.layers), np.inf), here])
        return values

    @cached_property
    def _inner(self) -> dict[tuple[int, int], tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """Of every stage but the first: its seconds before another one, and as the last one."""
        every = itertools.product(range(len(self.machines)), range(len(self.table.degrees)))
        return {(i, t): (self._terms(i, t, False), self._ends(i, t, False)) for i, t in every}

    @cached_property
    def _left(self) -> NDArray[np.int64]:
        """[remaining, taken - 1] layers left; what cannot be is 0, for which nothing follows."""
        remaining, taken = np.indices((self.layers + 1, self.layers))
        return np.maximum(remaining - taken - 1, 0)

    def _takes(self, free: Counts) -> Iterator[tuple[int, int, int]]:
        for i, count in enumerate(free):
            for t, n in enumerate(self.table.degrees):
                if n <= count:
                    yield i, t, n

    def _joined(self, one: NDArray[np.float64], other: NDArray[np.float64]):
        return (np.add if self.objective == "latency" else np.maximum)(one, other)

    def _terms(self, i: int, t: int, is_first: bool) -> NDArray[np.float64]:
        """[next machine, layers - 1] seconds of a stage that is not the last."""
        table, m = self.table, self.machines[i]
        taken = np.arange(1, self.layers + 1)
        times = table.stage_s[m, t] + taken * table.layer_s[m, t]
        times = table.hop_s[m, self.machines][:, None] + times
        is_out = (taken > table.caps[m, t, int(is_first), 0]) | (times > self.limit_s)
        return np.where(is_out, np.inf, times)

    def _ends(self, i: int, t: int, is_first: bool) -> NDArray[np.float64]:
        """[remaining] seconds of a last stage that takes them all."""
        table, m = self.table, self.machines[i]
        taken = np.arange(self.layers + 1)
        times = table.stage_s[m, t] + taken * table.layer_s[m, t] + table.last_s[m, t]
        is_out = (taken > table.caps[m, t, int(is_first), 1]) | (times > self.limit_s)
        if self.first is not None and not is_first:
            times = times + table.back_s[m, self.first]
        return np.where(is_out | (taken == 0), np.inf, times)

    def _choices(
        self,
        values: dict[Counts, NDArray[np.float64]],
        free: Counts,
        i: int,
        layers: int,
        is_first: bool,
    ) -> Iterator[tuple[float, tuple[Stage, Counts, int]]]:
        """The value, and what it leads to, of the best stage of each degree on machine `i`, of
        those that are possible; the next machine is -1 behind the last one."""
        for j, t, n in self._takes(free):
            if j != i:
                continue
            rest = tuple(count - n * (k == i) for k, count in enumerate(free))
            after = values[rest][:, self._left[layers]]
            total = self._joined(after, self._terms(i, t, is_first))
            following, taken = np.unravel_index(np.argmin(total), total.shape)
            if np.isfinite(total[following, taken]):
                stage = Stage(self.machines[i], n, int(taken) + 1)
                yield float(total[following, taken]), (stage, rest, int(following))
            if not (self.use_all and any(rest)):
                value = float(self._ends(i, t, is_first)[layers])
                if np.isfinite(value):
                    yield value, (Stage(self.machines[i], n, layers), rest, -1)
