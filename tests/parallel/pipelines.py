"""Plans on eight virtual devices against the plain model, in a process of their own: the number of
devices is fixed when jax starts.

python -m tests.parallel.pipelines CASE... writes a JSON object per case.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

DEVICES = 8
PROMPTS, STEPS = (9, 4), 14  # tokens of the rows' prompts; steps behind them


@dataclass(frozen=True)
class Case:
    """`plan` has (degree, layers) of each stage."""

    model: str
    policy: str
    plan: tuple[tuple[int, int], ...]
    weights: str | None = None


CASES = {
    "one": Case("llama", "full", ((1, 4),)),
    "one-stages": Case("llama", "kivi", ((1, 1), (1, 2), (1, 1))),
    "two": Case("llama", "full", ((2, 4),)),
    "kivi": Case("llama", "kivi", ((4, 1), (2, 2), (1, 1))),
    "streaming": Case("llama", "streaming", ((1, 1), (4, 2), (2, 1))),
    "h2o": Case("llama", "h2o", ((2, 1), (2, 2), (4, 1))),
    "less": Case("llama", "less-h2o", ((2, 2), (4, 2))),
    "nine-2": Case("nine", "h2o", ((2, 3), (1, 1))),
    "nine-3": Case("nine", "kivi", ((3, 1), (1, 3))),
    "nine-4": Case("nine", "full", ((4, 2), (2, 2))),
    "alibi": Case("mpt", "h2o", ((2, 1), (3, 3))),
    "learned": Case("learned", "kivi", ((3, 2), (2, 2))),
    "parallel": Case("parallel", "streaming", ((2, 3), (4, 1))),
    "sliding": Case("sliding", "full", ((2, 2), (1, 2))),
    "int8": Case("llama", "full", ((3, 2), (2, 2)), "int8"),
    "hyena": Case("hyena", "full", ((2, 1), (3, 3))),
}


def results(names: Sequence[str]) -> dict[str, dict]:
    """What each case has come to."""
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} "
        f"--xla_force_host_platform_device_count={DEVICES}"
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.parallel.pipelines", *names],
        env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    lines = map(json.loads, done.stdout.splitlines())
    return {line.pop("name"): line for line in lines}


def _model(name: str):
    import jax

    from jaxinfer.testing.models import BASE, CONFIGS, _loud_params
    from tests.models import hyena_models

    if name == "hyena":
        cfg = replace(
            hyena_models.MULTI, num_layers=4, mixers=("hyena", "attn", "hyena", "attn"),
            hyena=replace(hyena_models.MULTI.hyena, modes=(5, 0, 0, 0)),
        )  # fmt: skip
        return cfg, hyena_models.params_of(cfg)
    if name == "nine":
        cfg = replace(BASE, num_heads=9, num_kv_heads=3, tie_embeddings=True)
    else:
        cfg = CONFIGS[name]
    windows = cfg.sliding_windows and cfg.sliding_windows * 2
    cfg = replace(cfg, num_layers=4, sliding_windows=windows)
    return cfg, _loud_params(cfg, jax.random.key(0), "float32")


def _policy(name: str, cfg):
    from tests.policies import MATRIX, with_random_feature_maps

    case = next(case for case in MATRIX if case.name == name)
    return with_random_feature_maps(case.hard(), cfg)


def run(name: str) -> dict:
    """Rows of a prompt and greedy steps through the plan and through the plain stack."""
    import jax.numpy as jnp
    import numpy as np

    from jaxinfer.models.part import part_of
    from jaxinfer.models.quantize import quantize_params
    from jaxinfer.parallel.shard import mesh_of
    from jaxinfer.parallel.stage import Stage
    from jaxinfer.testing.models import random_tokens

    case = CASES[name]
    cfg, params = _model(case.model)
    if case.weights is not None:
        params = quantize_params(cfg, params, case.weights)
    policy = _policy(case.policy, cfg)
    stages, layer, device = [], 0, 0
    for degree, count in case.plan:
        layers = range(layer, layer + count)
        mesh = mesh_of(degree, device % (DEVICES - degree + 1))
        stages.append(
            Stage(cfg, part_of(cfg, params, layers), layers, policy=policy, capacity=64,
                  rows=len(PROMPTS), mesh=mesh)
        )  # fmt: skip
        layer, device = layer + count, device + degree
    prompts = [random_tokens(1, size, seed=size)[0] for size in PROMPTS]

    def through(what, x):
        for stage in stages:
            x = np.asarray(what(stage, x))
        return x

    logits = []
    for row, prompt in enumerate(prompts):
        tokens = np.zeros((1, 16), np.int32)
        tokens[0, : len(prompt)] = prompt
        sizes = len(prompt), 0, len(prompt)
        logits.append(through(lambda s, x, row=row, sizes=sizes: s.prefill(row, x, *sizes), tokens))
        for stage in stages:
            stage.insert(row, 0, row)
    found, lengths = [np.concatenate(logits)[:, 0]], np.array(PROMPTS)
    for _ in range(STEPS):
        token = jnp.asarray(found[-1].argmax(axis=1)[:, None], jnp.int32)
        rows = range(len(PROMPTS)), lengths.tolist()
        found.append(through(lambda s, x, rows=rows: s.step(0, x, *rows), token)[:, 0])
        lengths += 1
    expected = _plain(cfg, params, policy, prompts)
    pairs = zip(found, expected, strict=True)
    errors = [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs]
    tokens = [np.stack(x).argmax(axis=-1).tolist() for x in (found, expected)]
    return {
        "name": name,
        "errors": errors,
        "same_tokens": tokens[0] == tokens[1],
        "equal_bits": bool(np.array_equal(np.stack(found), np.stack(expected))),
        "collectives": [_collectives(stage) for stage in stages],
        "moved": bool(_moves_a_row(stages[0])),
    }


def _plain(cfg, params, policy, prompts) -> list:
    """The logits of the stack itself, row by row."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxinfer.decode.engine import padded, with_feature_maps
    from jaxinfer.decode.loop import prefill
    from jaxinfer.models.params import served_params
    from jaxinfer.models.stack import commit, forward, init_cache

    params = with_feature_maps(served_params(cfg, params), policy)
    read = jax.jit(prefill, static_argnums=(0, 6))

    @jax.jit
    def step(cache, token):
        out = forward(cfg, params, token[:, None], cache)
        one = jnp.ones_like(token)
        return commit(cfg, params, cache, out.fresh, None, one, out.logits), out.logits[:, 0]

    caches, logits = [], []
    for prompt in prompts:
        cache = init_cache(cfg, params, policy, 1, 64, contexts=[len(prompt)])
        zeros = jnp.zeros((1, cfg.vocab_size), jnp.float32)
        count = jnp.asarray([len(prompt)], jnp.int32)
        cache, found = read(cfg, params, cache, zeros, padded([prompt], 16), count, False)
        caches.append(cache)
        logits.append(found)
    cache = jax.tree.map(lambda *x: jnp.concatenate(x), *caches)
    logits = [jnp.concatenate(logits)]
    for _ in range(STEPS):
        cache, found = step(cache, jnp.argmax(logits[-1], axis=1).astype(jnp.int32))
        logits.append(found)
    return [np.asarray(x) for x in logits]


def _collectives(stage) -> dict[str, int]:
    """How often a compiled step has each."""
    program = stage.programs["run"]
    found = {}
    for compiled in program._compiled.values():
        text = compiled.executable.as_text()
        names = re.findall(r" (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", text)
        found[str(len(found))] = {one: names.count(one) for one in set(names)}
    return found[str(len(found) - 1)]  # the step, compiled last


def _moves_a_row(stage) -> bool:
    """A row that leaves and comes back steps as before."""
    import numpy as np

    x = np.full((stage.rows, 1), 7, np.int32)
    length = int(stage._lengths[0, 1])
    row = stage.export_row(0, 1)
    first = np.asarray(stage.step(0, x, [1], [length]))
    stage.free(0, 1)
    stage.import_row(5, row)
    stage.insert(5, 0, 1)
    return np.array_equal(first[1], np.asarray(stage.step(0, x, [1], [length]))[1])


if __name__ == "__main__":
    from tests import compilation

    compilation.quickly(True)
    for one in sys.argv[1:]:  # in one process, as most of the time is imports and compilation
        print(json.dumps(run(one)), flush=True)
