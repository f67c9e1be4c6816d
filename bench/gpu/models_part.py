"""A trained model with our kernels beside the same model as XLA alone compiles it.

The committed tiny-llama in float32 continues a ragged batch at temperature 0 through every policy,
with packed weights and with speculation. Both runs must give the same tokens as far as their
probabilities are the same; where two tokens are as likely as each other, rounding decides.
"""

import functools
from typing import Any

import jax

import jaxinfer as ji
from bench.gpu.rows import Run
from bench.gpu.step import Plain

MODEL, DRAFT = "tiny-llama", "draft-tiny-llama"
PROMPTS = ("The history of", "Water is", "In the year of the first war the people of the town had")
NEW_TOKENS = 96
TOLERANCE = 2e-2  # of a log-probability
INT4_TOLERANCE = 1e-1  # both round activations to bfloat16 on the way
CASES: dict[str, dict[str, Any]] = {
    "full": {"policy": ji.full()},
    "kivi 2 bits": {"policy": ji.kivi(bits=2, group=16, residual=16)},
    "kivi 4 bits": {"policy": ji.kivi(bits=4, group=16, residual=16)},
    "streaming 4 + 28": {"policy": ji.streaming(4, 28)},
    "h2o 16 + 16": {"policy": ji.h2o(16, 16)},
    "full, int4": {"policy": ji.full(), "weights": "int4"},
    "full, sequoia": {"policy": ji.full(), "draft": DRAFT},
}


def agreement(case: str, kernel: Any) -> dict[str, Any]:
    with jax.default_matmul_precision("highest"):
        ours, theirs = (continuations(case, name) for name in (kernel, "reference"))
    together, worst = 0, 0.0
    for a, b in zip(ours, theirs, strict=True):
        pairs = zip(a.tokens, b.tokens, a.log_probs, b.log_probs, strict=False)
        for token, other, log_prob, wanted in pairs:
            worst = max(worst, abs(log_prob - wanted))
            if token != other:
                break
            together += 1
    tolerance = INT4_TOLERANCE if "int4" in case else TOLERANCE
    return {
        "largest_error": worst,
        "tolerance": tolerance,
        "agrees": worst <= tolerance and bool(together),
        "same_tokens": together,
        "tokens": sum(len(b.tokens) for b in theirs),
    }


def continuations(case: str, implementation: Any) -> list[ji.Completion]:
    options = dict(CASES[case])
    lm = ji.load(
        MODEL, dtype="float32", weights=options.pop("weights", None), implementation=implementation
    )
    if "draft" in options:
        options["draft"] = ji.load_draft(lm, options["draft"])
    run = functools.partial(lm.generate, ignore_eos=True, max_new_tokens=NEW_TOKENS)
    return run(list(PROMPTS), sampler=ji.Sampler(temperature=0.0), **options)


def steps(run: Run) -> list[Plain]:
    names = ("full", "kivi 2 bits") if run.quick else CASES
    kernel = "interpret" if run.interpret else None
    return [
        Plain(
            {"part": "models", "op": MODEL, "case": name},
            functools.partial(agreement, name, kernel),
        )
        for name in names
    ]
