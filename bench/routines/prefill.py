"""Prefill speed: tokens per second of one long prompt, up to the logits of its last token.

Compared with transformers on torch with the same weights, and with llama.cpp where it runs.
"""

from functools import partial

from bench import peers
from bench.harness import Measure, interleave, ratio
from bench.models import prompts
from bench.options import Options
from bench.routines.decode import RATE
from bench.worker import Worker


def run(options: Options) -> list[tuple[dict, dict]]:
    sizes = options.settings("prefill")
    with peers.Peers(options) as started:
        ours, facts = started.jaxinfer()
        prompt = prompts(options.seed, 1, sizes["tokens"], facts["vocab"])[0]

        def trial(worker: Worker) -> float:
            return worker.call("prefill", prompt=prompt[: sizes["trial"]])["seconds"]

        torch = started.torch(ours)
        llama = started.llama_cpp(sizes["tokens"] + 8)
        workers = {"jaxinfer": ours, "torch": torch, "llama.cpp": llama}
        for worker in filter(None, (torch, llama)):
            started.tune(worker, trial)
        measures: dict[str, Measure] = {
            name: partial(worker.call, "prefill", prompt=prompt)
            for name, worker in workers.items()
            if worker is not None
        }
        samples = interleave(measures, sizes["rounds"], options.say)
        mine = samples["jaxinfer"]
        metrics = {name: peer.summary(RATE, "seconds") for name, peer in samples.items()}
        metrics["jaxinfer"]["compile_s"] = mine.first["compile_s"]
        metrics["ratios"] = {
            name: ratio(mine, peer, RATE) for name, peer in samples.items() if peer is not mine
        }
        if torch is not None:
            metrics["same_token_as_torch"] = (
                mine.first["tokens"] == samples["torch"].first["tokens"]
            )
        metrics |= {
            "device": facts["device"],
            "peer_facts": started.facts,
            "missing": started.missing,
        }
    config = {"tokens": sizes["tokens"], "rounds": sizes["rounds"]}
    return [(options.config(config), metrics)]
