"""Decode time per token against the live context, at cache capacities of 1x and 4x of it.

Time has to follow what is stored, not what is reserved. The floor beside each time is the bytes
that the step must read over the measured read bandwidth. Cache contents are zeros: see the peer.
"""

import statistics
from functools import partial

from bench import peers
from bench.harness import Measure, interleave
from bench.options import Options


def run(options: Options) -> list[tuple[dict, dict]]:
    sizes = options.settings("context-scaling")
    with peers.Peers(options) as started:
        ours, facts = started.jaxinfer()
        steps = sizes["steps"]
        bandwidth = ours.call("bandwidth", megabytes=sizes["bandwidth_mb"])
        contexts = [live for live in sizes["contexts"] if live <= facts["max_positions"]]
        points = [(live, factor) for live in contexts for factor in sizes["capacity_factors"]]
        measures: dict[str, Measure] = {
            f"{live} live of {live * factor}": partial(
                ours.call, "context", live=live, capacity=live * factor, steps=steps
            )
            for live, factor in points
        }
        samples = interleave(measures, sizes["rounds"], options.say)
    rows = []
    for (live, factor), taken in zip(points, samples.values(), strict=True):
        rows.append(
            {
                "context": live,
                "capacity": live * factor,
                "factor": factor,
                "floor_ms": peers.floor(bandwidth, facts, live)["floor_ms"],
                "compile_s": taken.first["compile_s"],
                "ms_per_token": taken.summary("ms_per_token")["ms_per_token"],
            }
        )
    metrics = {
        "points": rows,
        "capacity_cost": capacity_cost(rows),
        "read_gb_per_s": bandwidth / 1e9,
        "device": facts["device"],
        "missing": {},
    }
    return [(options.config(sizes), metrics)]


def capacity_cost(rows: list[dict]) -> float | None:
    """Median over contexts of the time at the largest capacity over that at the smallest."""
    ratios = []
    for live in {row["context"] for row in rows}:
        same = sorted((row for row in rows if row["context"] == live), key=lambda r: r["factor"])
        if len(same) > 1:
            last, first = same[-1]["ms_per_token"], same[0]["ms_per_token"]
            ratios.append(last["median"] / first["median"])
    return statistics.median(ratios) if ratios else None
