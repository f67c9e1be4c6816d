"""What trained predictors find on held-out text, how many units each layer takes by that, and the
artefact that says so.

Axis letters: L layers, R rows (held out), D width, J units, P rank.
"""

import copy
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from jaxinfer.config import ModelConfig
from jaxinfer.sparsity.artefact import SparsityArtefact
from jaxinfer.sparsity.base import Rule
from jaxinfer.sparsity.identity import SparsityConfig
from jaxinfer.sparsity.learned import LayerSparsity
from jaxinfer.sparsity.predictors import router
from jaxinfer.sparsity.recall import (
    by_density,
    capacities,
    in_parts,
    recall_curve,
    shuffled,
    unions,
)
from jaxinfer.train.dejavu.collection import Collection, Kind
from jaxinfer.train.dejavu.recipe import DejavuRecipe
from jaxinfer.typing import Json, Params

DENSITIES = (0.75, 0.5, 0.375, 0.25, 0.125, 0.0625)
TIMES = (1.0, 1.5, 2.0)  # the share of the units that are needed
MULTIPLE = 16  # single neurons are read by so many (`pallas_kernels.sparse_mlp`)


def scores_of(matrices: Params, x: Float[np.ndarray, "R D"]) -> Float[np.ndarray, "R J"]:
    """The logits of one layer's predictor, as `jaxinfer.sparsity.base.Router` scores."""
    return (x.astype(np.float32) @ matrices["inner"].T) @ matrices["outer"].T


def results_of(
    found: Collection, trained: Mapping[Kind, Params], first: int, num_layers: int
) -> Json:
    """What each layer's predictors find among the rows from `first` on, for JSON."""
    layers: list[Json] = [{"layer": index} for index in range(num_layers)]
    order = first + shuffled(found.rows - first, found.recipe.seed)
    for kind in trained:
        for place, index in enumerate(found.layers(kind, num_layers)):
            one = {name: trained[kind][name][place] for name in ("inner", "outer")}
            scores = scores_of(one, found.inputs(kind, index)[order])
            needed = found.labels(kind, index, order)
            layers[index][kind] = findings(scores, needed, found.recipe, kind)
    return {"rows": found.rows, "held_out_rows": found.rows - first, "layers": layers}


def findings(
    scores: Float[np.ndarray, "R J"],
    needed: Bool[np.ndarray, "R J"],
    recipe: DejavuRecipe,
    kind: Kind,
) -> Json:
    """Recall by density, the capacities of `jaxinfer.sparsity.recall`, and what is chosen.

    `density` is the share of the units that are needed; `half` is what the classifier finds where
    it calls a unit likelier needed than not.
    """
    units, density = scores.shape[1], float(needed.mean())
    curve = recall_curve(scores, needed)
    multiple = MULTIPLE if kind == "neurons" and recipe.block_size == 1 else 1
    most = max(int(recipe.most * units), 1)
    schedule = capacities(scores, needed, recipe.recall, multiple=multiple, most=most)
    wanted = recipe.density if kind == "neurons" else recipe.heads
    count = schedule[0].units if wanted is None else by_density(units, wanted, multiple)
    likely = scores > 0
    some = needed.any(axis=1)
    hits = (likely & needed)[some].sum(axis=1) / needed[some].sum(axis=1)

    def at(units: int) -> Json:
        found = {"units": units, "recall": float(curve[units - 1])}
        return found | {"unions": list(_unions(scores, units))}

    return at(count) | {
        "density": density,
        "in_parts": in_parts(curve),
        "half": {"density": float(likely.mean()), "recall": float(hits.mean())},
        "times": [
            {"times": times, "recall": float(curve[by_density(units, min(times * density, 1)) - 1])}
            for times in TIMES
        ],
        "densities": [at(by_density(units, share, multiple)) for share in DENSITIES],
        "schedule": [asdict(one) for one in schedule],
    }


def _unions(scores: np.ndarray, count: int) -> tuple[float, ...]:
    """Of the units that rows select by themselves."""
    best = np.argpartition(-scores, count - 1, axis=1)[:, :count]
    selected = np.zeros(scores.shape, bool)
    np.put_along_axis(selected, best, True, axis=1)
    return unions(selected)


def artefact_of(
    cfg: ModelConfig,
    recipe: DejavuRecipe,
    trained: Mapping[Kind, Params],
    results: Json,
    *,
    fingerprint: str,
    model: str,
    used: dict[str, Any],
) -> SparsityArtefact:
    """The predictors as routers, each with the number of units that `results` chose."""
    results = copy.deepcopy(results)  # what a layer itself has is taken out below
    routers: dict[Kind, dict[int, Any]] = {kind: {} for kind in trained}
    for kind, part in trained.items():
        having = [row for row in results["layers"] if kind in row]
        for place, row in enumerate(having):
            one = {name: part[name][place] for name in ("inner", "outer")}
            rule = Rule(most=row[kind]["units"])
            routers[kind][row["layer"]] = router(one, rule, recipe.lookahead)
    layers = []
    for index, row in enumerate(results["layers"]):
        neurons, heads = (routers.get(kind, {}).get(index) for kind in ("neurons", "heads"))
        if neurons is None and heads is None:
            layers.append(None)
            continue
        found = row.get("neurons", {})
        shares, recalls = tuple(found.get("unions", ())), tuple(found.pop("in_parts", ()))
        layers.append(LayerSparsity(router=neurons, heads=heads, unions=shares, recalls=recalls))
    config = SparsityConfig.of(
        cfg, fingerprint, method="deja_vu", model=model, block_size=recipe.block_size,
        lookahead=recipe.lookahead, recipe=used, results=results,
    )  # fmt: skip
    return SparsityArtefact(config, tuple(layers))
