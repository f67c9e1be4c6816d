"""What users call, with odd values: each input is a line of Python.

Nothing is compiled: a call ends where all of its arguments have been checked, which is before that.
"""

import contextlib
import random
from pathlib import Path
from unittest import mock

import jax.numpy as jnp
import numpy as np

import jaxinfer as ji
from jaxinfer.cache.presets import POLICIES
from jaxinfer.decode import scoring
from jaxinfer.decode.engine import Engine
from jaxinfer.decode.run import Run
from jaxinfer.models.quantize import quantize_params
from jaxinfer.names import SPARSITIES
from jaxinfer.speculative import tuning
from jaxinfer.speculative.acceptance import Acceptance
from tools.fuzz.target import Target
from tools.fuzz.targets.models import random_lm, real_lm

VALUES = (
    *("None", "True", "False", "0", "1", "-1", "3", "2**31", "2**63", "-2**63", "2**64", "10**30"),
    *("0.5", "1.0", "-0.0", "1e-40", "1e38", "1e308", "float('nan')", "float('inf')"),
    *("-float('inf')", "1j", "''", "'a'", "'\\x1b[2J'", "'\\ud800'", "'x' * 5000", "b'ab'"),
    *("[]", "()", "{}", "set()", "{1, 2}", "{'a': 1}", "{1: 2.0}", "{'1': 0.5}", "[None]", "[[]]"),
    *("[1, 2, 3]", "['a', 'b']", "[1.5]", "[True]", "[-1]", "[10**6]", "[2**70]", "[[1], [2, 3]]"),
    *("[['a']]", "['a', 1]", "[1, 'a']", "range(3)", "iter([1])", "(x for x in 'ab')", "len"),
    *("np.int64(3)", "np.float32(0.5)", "np.array(3)", "np.array([1, 2])", "np.zeros((2, 2))"),
    *("np.zeros((2, 2), int)", "np.array(['a'])", "np.array([])", "np.array([1.5, 2])"),
    *("np.array([2**63], np.uint64)", "np.array([True])", "jnp.arange(3)", "jnp.ones(2)"),
    *("np.array([[1, 2], [3, 4]], object)", "object()", "int", "ji", "lm", "lm.config"),
    *("ji.Sampler()", "[ji.Sampler()]", "ji.full()", "ji.kivi()", "ji.Topology.chain(3)"),
    *("'full'", "'kivi4'", "'prompt-lookup'", "'exit:1'", "{'name': 'h2o'}", "{'name': None}"),
    *("'lte'", "'deja-vu'", "{'name': 'lte', 'source': 'nowhere'}"),
    *("Exception('a')", "...", "type", "bytearray(b'a')", "memoryview(b'a')", "'/dev/null'", "'.'"),
)
AROUND = ("[{0}]", "({0},)", "{{'name': {0}}}", "[{0}] * 2", "lambda: {0}")
OPTIONS = (
    *("policy", "sampler", "max_new_tokens", "seed", "samples", "stop", "ignore_eos", "prefix"),
    *("draft", "sparsity"),
)
SAMPLER = (
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "logit_bias"),
)
CALLS = {
    "lm.generate": (("prompts",), OPTIONS),
    "lm.stream": (("prompt",), OPTIONS),
    "lm.chat": (("messages",), tuple(o for o in OPTIONS if o != "prefix")),
    "lm.session": (("policy",), ("sparsity",)),
    "lm.session().append": (("prompt",), ()),
    "lm.session().generate": (("prompt",), tuple(o for o in OPTIONS if o != "prefix")),
    "lm.session().stream": (("prompt",), tuple(o for o in OPTIONS if o != "prefix")),
    "lm.score": (("texts",), ("policy", "chunk", "sparsity")),
    "lm.sparsified": (("sparsity",), ()),
    "lm.logits": (("tokens",), ()),
    "lm.encode": (("prompt",), ()),
    "lm.chat_tokens": (("messages",), ()),
    "lm.restore": (("path",), ("policy", "sparsity")),
    "lm.offloaded": (("stay",), ()),
    "lm.warmup": (
        ("prompt_lengths",),
        ("batch", "max_new_tokens", "policy", "sampler", "samples", "draft", "sparsity"),
    ),
    "ji.load": (("source",), ("dtype", "weights", "implementation", "sparsity", "progress")),
    "ji.load_draft": (("target", "source"), ("dtype", "weights", "implementation", "progress")),
    "ji.early_exit": (("lm", "layers"), ()),
    "ji.speculate": (("target", "draft"), ("topology", "method", "support", "policy")),
    "ji.Sampler": ((), SAMPLER),
    "ji.streaming": ((), ("sinks", "window", "positions", "bits", "group", "residual")),
    "ji.h2o": ((), ("heavy", "recent")),
    "ji.kivi": (
        (),
        (
            *("bits", "group", "residual", "key_bits", "value_bits", "value_flush", "flush_order"),
            *("key_grouping", "value_grouping", "scale_dtype", "residual_dtype"),
        ),
    ),
    "ji.less": (("base",), ("feature_maps", "kernels")),
    "ji.per_layer": (("policies",), ()),
    "ji.register_policy": (("name", "factory"), ()),
    "ji.register_sparsity": (("name", "factory"), ()),
    "ji.deja_vu": (("source",), ("density", "heads")),
    "ji.lte": (("source",), ()),
    "ji.Topology": (("parent",), ()),
    "ji.Topology.optimal": (("acceptance", "nodes"), ("levels", "branching")),
    "ji.Topology.chain": (("n",), ()),
    "ji.Topology.k_chains": (("k", "n"), ()),
    "ji.Topology.from_parents": (("parents",), ()),
    "ji.Topology.from_children": (("root",), ()),
    "ji.Topology.load": (("path",), ()),
    "ji.expected_tokens": (("topology", "acceptance"), ()),
    "acceptance": (("p",), ("temperature", "top_p", "pair", "samples", "seed")),
    "quantize_params": (("cfg", "params", "format"), ()),
}
"""The calls that are tried: arguments by position, and by keyword."""

GOOD = {
    "prompts": "'Hello'", "prompt": "[1, 2]", "messages": "[{'role': 'user', 'content': 'a'}]",
    "texts": "'Hello you'", "tokens": "[[1, 2]]", "path": "'nowhere'", "stay": "1",
    "prompt_lengths": "[4]", "source": "'nowhere'", "target": "lm", "draft": "'prompt-lookup'",
    "lm": "lm", "layers": "1", "base": "'h2o'", "policies": "['full'] * 6", "name": "'b'",
    "factory": "ji.full", "parent": "(-1, 0)", "acceptance": "[0.5, 0.2]", "nodes": "4", "n": "3",
    "k": "2", "parents": "[-1, 0]", "root": "[[], []]", "topology": "ji.Topology.chain(3)",
    "cfg": "lm.config", "params": "lm.params", "format": "'int8'", "p": "(0.5, 0.2)",
    "policy": "'full'",
}  # fmt: skip


STOPPED = (
    (Run, "pieces", lambda self, steps: iter(())),
    (Engine, "prefill", lambda self, cache, *_, **__: (cache, None)),
    (
        scoring,
        "read",
        lambda engine, cache, tokens, *_, **__: (cache, scoring.Reading(tokens, tokens)),
    ),
    (tuning.FastestTree, "__call__", lambda self, run: ji.Topology.chain(2)),
)
"""What would compile, with what it gives instead."""


def make(folder: Path) -> None:
    for lm in (real_lm(), random_lm()):
        vars(lm)["_logits"] = lambda params, tokens: tokens
    (folder / "call.py").write_text("lm.encode('Hello')")


def mutate(rng: random.Random, _: str, data: bytes) -> bytes:
    name = rng.choice(list(CALLS))
    required, optional = CALLS[name]
    chosen = {key: GOOD.get(key, "None") for key in required}
    for key in rng.sample(optional, min(len(optional), rng.choice((0, 1, 1, 2)))):
        chosen[key] = value(rng)
    for key in required:
        if rng.random() < 0.3 or not optional:
            chosen[key] = value(rng)
    arguments = ", ".join(
        text if key in required else f"{key}={text}" for key, text in chosen.items()
    )
    model = rng.choice(("lm", "lm", "bare")) if name.startswith("lm.") else "lm"
    return f"{name.replace('lm.', f'{model}.', 1)}({arguments})".encode("utf-8", "surrogatepass")


def value(rng: random.Random) -> str:
    """An expression; some hold others."""
    one = rng.choice(VALUES)
    if rng.random() < 0.1:
        return rng.choice(
            ("[{0}]", "({0},)", "{{'name': {0}}}", "[{0}] * 2", "lambda: {0}")
        ).format(one)
    return one


def parse(folder: Path) -> None:
    """Evaluates the line with everything stopped that would compile."""
    line = (folder / "call.py").read_text()
    names = {
        "ji": ji, "np": np, "jnp": jnp, "lm": real_lm(), "bare": random_lm(),
        "quantize_params": quantize_params, "acceptance": lambda p, **rest: Acceptance(p=p, **rest),
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for registry in (POLICIES, SPARSITIES):  # names of an earlier line
            stack.enter_context(mock.patch.dict(registry._known))
        for owner, name, instead in STOPPED:
            stack.enter_context(mock.patch.object(owner, name, instead))
        eval(line, names)


TARGETS = (Target("request", make, parse, share=20, mutate=mutate),)
