"""Decode speed: tokens per second at several batch sizes.

Compared with transformers on torch (same weights), with the dots-only program (the reachable floor;
the ratio is our share of it), with llama.cpp at batch 1 (4-bit weights, so a different amount of
work), and with the bandwidth floor: weight and cache bytes of a step over measured read bandwidth.
"""

from functools import partial
from typing import Any

from bench import peers
from bench.harness import Measure, Samples, interleave, ratio
from bench.models import prompts
from bench.options import Options
from bench.worker import Worker

RATE = "tokens_per_s"


def run(options: Options) -> list[tuple[dict, dict]]:
    sizes = options.settings("decode")
    found: list[tuple[dict, dict]] = []
    with peers.Peers(options) as started:
        ours, facts = started.jaxinfer()
        length, new = sizes["prompt"], sizes["new"]
        torch = started.torch(ours)
        llama = started.llama_cpp(length + new + 8)
        dots = started.dots()
        floor = peers.floor(
            ours.call("bandwidth", megabytes=sizes["bandwidth_mb"]), facts, length + new / 2
        )
        for batch, rounds in zip(sizes["batches"], sizes["rounds"], strict=True):
            given = {"prompts": prompts(options.seed, batch, length, facts["vocab"]), "new": new}
            measures: dict[str, Measure] = {"jaxinfer": partial(ours.call, "generate", **given)}
            for worker in (torch, llama if batch == 1 else None):
                if worker is not None:
                    started.tune(worker, partial(trial, given | {"new": sizes["trial"]}))
                    measures[worker.name] = partial(worker.call, "generate", **given)
            steps = sizes["dots_steps"]
            measures["dots-only"] = partial(dots.call, "steps", batch=batch, steps=steps)
            say = lambda text, batch=batch: options.say(f"batch {batch}, {text}")  # noqa: E731
            samples = interleave(measures, rounds, say)
            config = {"batch": batch, "rounds": rounds, "prompt": length, "new": new}
            metrics = describe(samples) | {
                "device": facts["device"],
                "peer_facts": dict(started.facts),
                "missing": started.missing,
            }
            if batch == 1:
                step = metrics["jaxinfer"]["ms_per_step"]["median"]
                metrics |= floor | {"floor_share": floor["floor_ms"] / step}
            if found:
                first = found[0][1]["jaxinfer"][RATE]["median"]
                metrics["gain_over_first_batch"] = metrics["jaxinfer"][RATE]["median"] / first
            found.append((options.config(config), metrics))
    return found


def trial(given: dict[str, Any], worker: Worker) -> float:
    """Seconds of a short generation, for choosing a thread count."""
    return worker.call("generate", **given)["seconds"]


def describe(samples: dict[str, Samples]) -> dict[str, Any]:
    """Each peer's rates and step times, and our rate divided by that of each peer."""
    ours = samples["jaxinfer"]
    metrics: dict[str, Any] = {
        name: peer.summary(RATE, "ms_per_step") for name, peer in samples.items()
    }
    metrics["jaxinfer"]["compile_s"] = ours.first["compile_s"]
    metrics["ratios"] = {
        name: ratio(ours, peer, RATE) for name, peer in samples.items() if peer is not ours
    }
    if "torch" in samples:
        metrics["same_tokens_as_torch"] = agreement(
            ours.first["tokens"], samples["torch"].first["tokens"]
        )
    return metrics


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Share of tokens before the first difference of each row."""
    equal = 0
    for mine, other in zip(ours, theirs, strict=True):
        for a, b in zip(mine, other, strict=True):
            if a != b:
                break
            equal += 1
    return equal / sum(map(len, ours))
