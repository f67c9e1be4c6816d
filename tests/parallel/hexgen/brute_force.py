"""All pipelines of a small group, one by one: what the dynamic programme has to agree with."""

import itertools
from collections.abc import Iterator

import numpy as np

from jaxinfer.parallel.hexgen.layouts import Stage, StageTable


def sequences(counts: tuple[int, ...], degrees: tuple[int, ...]) -> Iterator[tuple]:
    """All sequences of (machine, degree) that the accelerators allow."""
    yield ()
    for m, n in itertools.product(range(len(counts)), degrees):
        if n <= counts[m]:
            rest = tuple(c - n * (i == m) for i, c in enumerate(counts))
            for tail in sequences(rest, degrees):
                yield ((m, n), *tail)


def splits(layers: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write `layers` as a sum of positive parts."""
    for cuts in itertools.combinations(range(1, layers), parts - 1):
        yield tuple(np.diff((0, *cuts, layers)).tolist())


def pipelines(table: StageTable, counts, layers: int, use_all: bool = False):
    """(latency, bottleneck) of every pipeline that fits, from the definition of both."""
    for sequence in sequences(counts, table.degrees):
        if not sequence or len(sequence) > layers:
            continue
        if use_all and sum(n for _, n in sequence) != sum(counts):
            continue
        for split in splits(layers, len(sequence)):
            stages = tuple(Stage(m, n, x) for (m, n), x in zip(sequence, split, strict=True))
            found = value(table, stages)
            if found is not None:
                yield found


def value(table: StageTable, stages: tuple[Stage, ...]):
    """(latency, bottleneck), or None where the memory does not suffice."""
    latency, bottleneck = 0.0, 0.0
    for i, (m, n, layers) in enumerate(stages):
        t, last = table.degrees.index(n), i + 1 == len(stages)
        if layers > table.caps[m, t, int(i == 0), int(last)]:
            return None
        time = table.stage_s[m, t] + layers * table.layer_s[m, t]
        time += table.last_s[m, t] if last else table.hop_s[m, stages[i + 1].machine]
        latency, bottleneck = latency + time, max(bottleneck, time)
    if len(stages) > 1:
        latency += table.back_s[stages[-1].machine, stages[0].machine]
    return latency, bottleneck


def random_table(random: np.random.Generator, machines: int, layers: int, back: bool):
    """A group of few accelerators with random times, and caps that often are too small."""
    degrees, shape = (1, 2, 4), (machines, 3)
    alone = random.uniform(0.5, 2.0, (machines, 1))
    layer = alone * random.uniform(0.4, 1.1, shape)
    caps = random.integers(0, layers + 3, (*shape, 1, 1)) - random.integers(0, 3, (*shape, 2, 2))
    hop = random.uniform(0.0, 3.0, (machines, machines))
    return StageTable(
        degrees=degrees,
        layer_s=layer,
        stage_s=random.uniform(0.0, 0.5, shape),
        last_s=random.uniform(0.0, 0.5, shape),
        caps=np.maximum(caps, 0),
        hop_s=(hop + hop.T) / 2,
        back_s=random.uniform(0.0, 1.0, hop.shape) * back,
    )
