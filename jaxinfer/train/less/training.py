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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from jaxinfer.cache.feature_maps import LessConfig, LessFeatureMaps
from jaxinfer.config import ModelConfig
from jaxinfer.files import replacing
from jaxinfer.models.fingerprint import fingerprint
from jaxinfer.progress import Report, silent
from jaxinfer.train.less.data import Harvester, default_policies
from jaxinfer.train.less.layer import train_layer
from jaxinfer.train.less.objective import Eviction
from jaxinfer.train.less.recipe import LessRecipe
from jaxinfer.train.run_folder import (
    append_line,
    check_options,
    read_array,
    read_arrays,
    write_arrays,
)
from jaxinfer.typing import Params


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
            index, layer, hidden, policies, lambda done: report("reading", done, len(tokens))
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
        append_line(run / "log.jsonl", {"layer": index} | losses | seconds)
        write_arrays(path := _layer_path(run, index), maps)
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


def _states(run: Path, index: int, harvester, params: Params, tokens: np.ndarray, report):
    """The states in front of layer `index`, saved ones if there are any."""
    path = run / f"hidden-{index:02d}.npy"
    if path.is_file():
        return read_array(path)
    hidden = harvester.embed(params, tokens)
    for earlier, layer in enumerate(params["layers"][:index]):
        harvester.advance(
            earlier, layer, hidden, lambda done: report("skipping", done, len(tokens))
        )
    return hidden


def _layer_path(run: Path, index: int) -> Path:
    return run / "layers" / f"{index:02d}.npz"


def _last_by_layer(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for _, line in sorted({line["layer"]: line for line in lines}.items())]
