"""Trains LESS's feature maps: layer by layer, each gives back what its attention lost.

arXiv 2402.09398, section 3: the base model is frozen, and a layer's two feature maps are fitted so
that LESS attention, after the output projection, equals full attention there. Layers see the dense
model's activations, so they do not depend on each other. One set of maps serves all policies of
the recipe: every training step takes sequences and policies at random, and every `stride`-th row.

A run may be killed at any moment. Its folder holds `options.json`, `log.jsonl` (a line per
finished layer), `layers/NN.npz` (finished), `layer-NN/` (the one in progress: `jaxinfer.train.loop`
and the best maps so far) and `hidden-NN.npy`, the states in front of the next layer.
"""

import json
import shutil
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxinfer.cache.feature_maps import LessConfig, LessFeatureMaps, rounded
from jaxinfer.config import ModelConfig
from jaxinfer.files import read_json, replacing, write_json
from jaxinfer.models.fingerprint import fingerprint
from jaxinfer.nn.linear import linear
from jaxinfer.progress import Report, silent
from jaxinfer.train.less.data import Harvester, LayerData, default_policies
from jaxinfer.train.less.objective import Eviction, add_low_rank, strided_low_rank
from jaxinfer.train.loop import fit
from jaxinfer.typing import Params


@dataclass(frozen=True, kw_only=True)
class LessRecipe:
    """How feature maps are trained: as in the paper, but smaller and faster, and so without its
    dropout of 0.3 and at three times its rate.

    `extra` is what Baseline+ keeps beside the policy: the state of R = 8 in float32 takes as much
    memory as 8 tokens in 16 bits. The learning rate halves after every quarter of the steps.
    """

    hidden: int = 64
    rank: int = 8
    steps: int = 800
    batch: int = 2
    stride: int = 16
    dropout: float = 0.0
    learning_rate: float = 3e-3
    validation: float = 0.125
    evaluations: int = 8
    extra: int = 8
    seed: int = 0

    def __post_init__(self):
        if self.steps < 4 or self.batch < 1 or self.stride < 1:
            raise ValueError(f"a recipe needs steps >= 4, batch and stride >= 1, got {self}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")


def train_less(
    cfg: ModelConfig,
    params: Params,
    tokens: np.ndarray,
    recipe: LessRecipe,
    run: Path,
    *,
    model: str = "",
    policies: tuple[Eviction, ...] | None = None,
    report: Report = silent,
) -> LessFeatureMaps:
    """Feature maps of every layer, trained on `tokens` i32[Q, T] for `policies`, those of
    `default_policies` if None."""
    run = Path(run).absolute()
    (run / "layers").mkdir(parents=True, exist_ok=True)
    options = {
        "model": model,
        "fingerprint": fingerprint(params),
        "tokens": list(tokens.shape),
        "crc32": zlib.crc32(tokens.tobytes()),
    }
    if policies is not None:
        options["policies"] = [asdict(policy) for policy in policies]
    check_options(run, asdict(recipe) | options)
    harvester = Harvester(cfg, tokens.shape[1])
    policies = policies or default_policies(tokens.shape[1])
    total = cfg.num_layers
    found: list[Params] = []
    while (path := _layer_path(run, len(found))).is_file():
        found.append(read_arrays(path))
    hidden = None
    for index in range(len(found), total):
        if hidden is None:
            hidden = _states(run, index, harvester, params, tokens, report)
        began = time.perf_counter()
        layer = params["layers"][index]
        data = harvester.read(
            layer, hidden, policies, lambda done: report("reading", done, len(tokens))
        )
        read_s = time.perf_counter() - began
        maps, losses = train_layer(
            harvester, layer, data, policies, recipe, run / f"layer-{index:02d}",
            lambda done: report("training", done, recipe.steps), seed=recipe.seed + index,
        )  # fmt: skip
        seconds = {"read_s": read_s, "seconds": time.perf_counter() - began}
        # In this order: what a kill leaves behind is enough to go on.
        if index + 1 < total:
            with replacing(run / f"hidden-{index + 1:02d}.npy") as temporary:
                np.save(temporary, hidden)
        _append(run / "log.jsonl", {"layer": index} | losses | seconds)
        _write_arrays(path := _layer_path(run, index), maps)
        (run / f"hidden-{index:02d}.npy").unlink(missing_ok=True)
        shutil.rmtree(run / f"layer-{index:02d}", ignore_errors=True)
        found.append(read_arrays(path))
        report("layers", index + 1, total)
    config = LessConfig.of(
        cfg, options["fingerprint"], model=model, hidden=recipe.hidden, rank=recipe.rank,
        recipe=asdict(recipe) | {
            "sequences": tokens.shape[0],
            "context": tokens.shape[1],
            "policies": [asdict(policy) for policy in policies],
        },
        results={"layers": _last_by_layer(run / "log.jsonl")},
    )  # fmt: skip
    return LessFeatureMaps(config, tuple({"feature_map": maps} for maps in found))


def train_layer(
    harvester: Harvester,
    layer: Params,
    data: LayerData,
    policies: tuple[Eviction, ...],
    recipe: LessRecipe,
    folder: Path,
    report: Callable[[int], None] = lambda done: None,
    *,
    seed: int = 0,
) -> tuple[Params, dict[str, Any]]:
    """One layer's feature maps (the best on validation, as they are stored) and what they achieve.

    The losses are mean squared errors over the rows that have lost tokens, by policy: of the policy
    alone ("bare"), of Baseline+ ("plus") and of LESS ("less"), on validation sequences. Training
    and "recovered" weigh policies alike, each by its bare loss.
    """
    from jaxinfer.nn.feature_map import FeatureMaps

    cfg, stride = harvester.cfg, recipe.stride
    held_out = max(1, round(recipe.validation * len(data.q)))
    train = len(data.q) - held_out
    if train < 1:
        raise ValueError(f"{len(data.q)} sequences are too few to train on and validate; give more")
    module = FeatureMaps(
        cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, recipe.hidden, recipe.rank, recipe.dropout
    )
    out, errors = layer["attn"]["out"], row_errors(module)
    evaluate = jax.jit(errors)
    everything = [(row, p) for row in range(train, len(data.q)) for p in range(len(policies))]

    def measure(maps: Params | None, data: LayerData, rows: list[tuple[int, int]], policies):
        """Mean error by policy."""
        sums = np.zeros((len(policies), 2))
        for row, policy in rows:
            batch = data.batch([row], policies, [policy], [(stride + 1) // 2], stride)
            batch["out"] = out
            error = np.asarray(evaluate(maps, batch), np.float64)
            sums[policy] += (error * batch["weight"]).sum(), batch["weight"].sum()
        return sums[:, 0] / np.maximum(sums[:, 1], 1)

    bare = measure(None, data, everything, policies)
    # Every policy counts alike, and Adam's epsilon is small beside the gradients.
    scales = (1 / np.maximum(bare, 1e-30)).astype(np.float32)

    def loss(maps: Params, batch: Any, key: jax.Array):
        error = errors(maps, batch, key) * batch["weight"]
        return error.sum() / batch["rows"], {}

    def batches(step: int):
        report(step)
        generator = np.random.default_rng([seed, step])
        # Every sequence equally often: positions in a fresh order per pass.
        first = np.arange(step * recipe.batch, (step + 1) * recipe.batch)
        rows = [int(_shuffled(train, seed, int(i // train))[i % train]) for i in first]
        which = generator.integers(len(policies), size=recipe.batch)
        shifts = generator.integers(1, stride + 1, size=recipe.batch)
        batch = data.batch(rows, policies, which.tolist(), shifts.tolist(), stride)
        rows_used = np.float32(max(batch["weight"].sum(), 1))
        batch["weight"] *= scales[which, None]
        # Everything that differs between layers is an input: one program serves all of them.
        return batch | {"out": out, "rows": rows_used}

    best = folder / "best.npz"

    def validate(step: int, maps: Params) -> None:
        maps = rounded({name: np.asarray(x) for name, x in maps.items()})
        value = float((scales * measure(maps, data, everything, policies)).mean())
        _append(folder / "validation.jsonl", {"step": step, "share_of_bare": value})
        if not best.is_file() or value < float(read_arrays(best)["value"]):
            _write_arrays(best, {"value": np.asarray(value)} | maps)

    folder.mkdir(parents=True, exist_ok=True)
    keys = jax.random.key(seed)
    example = jnp.zeros((1, cfg.num_heads, 1, cfg.head_dim))
    start: Any = module.init(keys, example, example[:, : cfg.num_kv_heads])["params"]
    rate = optax.exponential_decay(recipe.learning_rate, recipe.steps // 4, 0.5, staircase=True)
    marks = {round(recipe.steps * (i + 1) / recipe.evaluations) for i in range(recipe.evaluations)}
    fit(
        loss, start, optax.adam(rate), batches, steps=recipe.steps, folder=folder, seed=seed,
        save_every=max(1, recipe.steps // 2), log_every=max(1, recipe.steps // 20),
        snapshots=marks | {0}, on_snapshot=validate,
    )  # fmt: skip
    maps = read_arrays(best)
    maps.pop("value")
    less = measure(maps, data, everything, policies)
    wider = tuple(policy.widened(recipe.extra) for policy in policies)
    plus = measure(None, *_widened(harvester, data, train, wider, policies))
    return maps, {
        "bare": bare.tolist(),
        "plus": plus.tolist(),
        "less": less.tolist(),
        "recovered": float(1 - (less / bare).mean()),
        "recovered_beyond_plus": float(1 - (less / plus).mean()),
    }


def row_errors(module):
    """`errors(maps, batch, key) -> f32[B, M]`: each row's squared error after the output
    projection `batch["out"]`, averaged over channels.

    Parameters of None leave the policy alone; with a key hidden units drop out.
    """

    def errors(maps: Params | None, batch: dict[str, Any], key: jax.Array | None = None):
        batch = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), batch)
        y = batch["kept"]
        if maps is not None:
            train = key is not None
            rngs = [None, None] if key is None else [{"dropout": k} for k in jax.random.split(key)]
            variables = {"params": maps}
            phi = module.apply(variables, batch["q"], train, method="query", rngs=rngs[0])
            psi = module.apply(variables, batch["k"], train, method="key", rngs=rngs[1])
            y = add_low_rank(y, batch["lse"], *strided_low_rank(phi, psi, batch["v"]))
        rows, size = y.shape[0], y.shape[2]
        y = linear(batch["out"], y.transpose(0, 2, 1, 3).reshape(rows, size, -1))
        return jnp.square(y.astype(jnp.float32) - batch["target"]).mean(axis=-1)

    return errors


def _widened(harvester: Harvester, data: LayerData, train: int, wider, policies):
    """The arguments of `measure` for the same rows under policies that keep more.

    Rows are those of the narrower policy, as far as the wider one has lost anything there.
    """
    found = []
    for row in range(train, len(data.q)):
        q, k, v = (jnp.asarray(x[row], jnp.float32)[None] for x in (data.q, data.k, data.v))
        found.append(harvester.kept(wider, q, k, v))
    arrays = {name: np.stack([one[name] for one in found]) for name in found[0]}
    part = {name: getattr(data, name)[train:] for name in ("q", "k", "v", "target")}
    rows = [(row, p) for row in range(len(data.q) - train) for p in range(len(wider))]
    return LayerData(**part, **arrays), rows, policies


def check_options(run: Path, options: dict[str, Any]) -> None:
    """Records a run's options; refuses to go on with other ones."""
    path = run / "options.json"
    if path.is_file():
        found = read_json(path)
        changed = [name for name in options if found.get(name) != options[name]]
        if changed:
            raise ValueError(
                f"{run} was started with other {', '.join(changed)}; use a new --run-dir"
            )
    write_json(path, options)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def _states(run: Path, index: int, harvester, params: Params, tokens: np.ndarray, report):
    """The states in front of layer `index`, saved ones if there are any."""
    path = run / f"hidden-{index:02d}.npy"
    if path.is_file():
        return np.load(path)
    hidden = harvester.embed(params, tokens)
    for layer in params["layers"][:index]:
        harvester.advance(layer, hidden, lambda done: report("skipping", done, len(tokens)))
    return hidden


def _shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, 1]).permutation(count)


def _layer_path(run: Path, index: int) -> Path:
    return run / "layers" / f"{index:02d}.npz"


def _write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with replacing(path) as temporary:
        np.savez(temporary, allow_pickle=False, **arrays)


def _append(path: Path, record: dict[str, Any]) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


def _last_by_layer(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for _, line in sorted({line["layer"]: line for line in lines}.items())]
