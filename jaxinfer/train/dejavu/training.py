"""Trains DejaVu's predictors of all layers in one run (arXiv 2310.17157, section 4.1).

The model is frozen. Its activations are collected once (`collection`), AdamW fits the predictors of
all layers together on random rows of the first sequences, and for each layer those parameters are
kept, as a file holds them, that find most of what the held-out sequences need with as many units as
they need: recall at a fixed density, since recall alone rewards selecting everything.

A run may be killed at any moment and gives the same numbers. Its folder holds `options.json`,
`activations/` until they are no longer needed, `fit/` (`jaxinfer.train.loop`), `best.npz` and, when
it is done, `trained.npz` and `results.json`.
"""

import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import optax
from jaxtyping import Int

from jaxinfer.config import ModelConfig
from jaxinfer.files import read_json, write_json
from jaxinfer.io.int8 import as_stored
from jaxinfer.models.fingerprint import fingerprint
from jaxinfer.models.layer_reader import valid_lengths
from jaxinfer.progress import Report, silent
from jaxinfer.sparsity.artefact import SparsityArtefact
from jaxinfer.sparsity.predictors import matrices, stacked
from jaxinfer.sparsity.recall import by_density, check_rows, recall_curve
from jaxinfer.train.dejavu.collection import Collection, Kind, collect
from jaxinfer.train.dejavu.objective import loss_of
from jaxinfer.train.dejavu.outcome import artefact_of, results_of, scores_of
from jaxinfer.train.dejavu.recipe import DejavuRecipe
from jaxinfer.train.loop import fit
from jaxinfer.train.run_folder import check_options, read_arrays, write_arrays
from jaxinfer.typing import Params

CHOOSING_ROWS = 1024  # held out, by which parameters are chosen; results are of all


def train_dejavu(
    cfg: ModelConfig,
    params: Params,
    tokens: Int[np.ndarray, "Q T"],
    recipe: DejavuRecipe,
    run: Path,
    *,
    lengths: Sequence[int] | None = None,
    model: str = "",
    report: Report = silent,
) -> SparsityArtefact:
    """Predictors of every layer, trained on `tokens` (of sequence q the first `lengths[q]`, None:
    all), and how many units each layer takes. Axis letters: Q sequences.

    Raises:
      ValueError: the recipe does not fit the model, the texts are too few, or the activations are
        unusable.
    """
    recipe.check(cfg)
    counts = valid_lengths(tokens, lengths)
    train = split(counts, recipe.validation)
    run = Path(run).absolute()
    run.mkdir(parents=True, exist_ok=True)
    origin = fingerprint(params)
    check_options(run, asdict(recipe) | {
        "model": model, "fingerprint": origin, "tokens": list(tokens.shape),
        "crc32": zlib.crc32(tokens.tobytes()), "lengths_crc32": zlib.crc32(repr(counts).encode()),
    })  # fmt: skip
    if not (run / "results.json").is_file():
        found = collect(
            cfg, params, tokens, recipe, run / "activations", lengths=counts, report=report
        )
        first = sum(counts[:train])
        trained = _fitted(cfg, found, first, run, report)
        write_arrays(run / "trained.npz", _flat(trained))
        write_json(run / "results.json", results_of(found, trained, first, cfg.num_layers))
    for name in ("activations", "fit"):
        shutil.rmtree(run / name, ignore_errors=True)
    trained, results = _nested(read_arrays(run / "trained.npz")), read_json(run / "results.json")
    used = asdict(recipe) | {"sequences": len(counts), "context": tokens.shape[1]}
    return artefact_of(cfg, recipe, trained, results, fingerprint=origin, model=model, used=used)


def split(lengths: Sequence[int], validation: float) -> int:
    """How many sequences, the first ones, are trained on; the share `validation`, at least one, is
    held out whole.

    Raises:
      ValueError: nothing would be left to train on, or too little to test on.
    """
    held_out = max(1, round(validation * len(lengths)))
    train = len(lengths) - held_out
    if train < 1:
        raise ValueError(
            f"{len(lengths)} sequences are too few to train and to test on; give at least 2"
        )
    check_rows(sum(lengths[train:]), f"the {held_out} sequences held out of {len(lengths)}")
    return train


def _fitted(
    cfg: ModelConfig, found: Collection, first: int, run: Path, report: Report
) -> dict[Kind, Params]:
    """Per kind the best `inner` [L, P, D] and `outer` [L, J, P], as they are stored, and the recall
    that chose them; `first` is the first row held out."""
    recipe, rank = found.recipe, found.recipe.rank_for(cfg)
    modules: dict[Kind, nn.Module] = {k: stacked(units, rank) for k, units in found.units.items()}
    layers = {kind: found.layers(kind, cfg.num_layers) for kind in modules}
    keys = jax.random.split(jax.random.key(recipe.seed), len(modules))
    start: Params = {}
    for key, (kind, module) in zip(keys, modules.items(), strict=True):
        x = jax.ShapeDtypeStruct((len(layers[kind]), 1, cfg.hidden_size), jax.numpy.float32)
        start[kind] = dict(jax.jit(module.lazy_init)(key, x)["params"])
    maps = {
        kind: [(found.inputs(kind, layer), found.packed(kind, layer)) for layer in these]
        for kind, these in layers.items()
    }
    batches = Batches(maps, first, recipe.batch, recipe.seed)
    choose = Choice(found, layers, first, run / "best.npz")
    count = recipe.evaluations
    fit(
        loss_of(modules, found.units), start,
        optax.adamw(recipe.learning_rate, weight_decay=recipe.weight_decay), batches,
        steps=recipe.steps, folder=run / "fit", seed=recipe.seed,
        save_every=max(1, recipe.steps // 4), log_every=max(1, recipe.steps // 20),
        snapshots={round(recipe.steps * (i + 1) / count) for i in range(count)} - {0},
        on_snapshot=choose, report=report,
    )  # fmt: skip
    return choose.best()


@dataclass(frozen=True)
class Batches:
    """The batch of a step, a pure function of it: random rows, the same of all layers."""

    maps: Mapping[Kind, Sequence[tuple[np.ndarray, np.ndarray]]]  # per layer: inputs, packed labels
    rows: int  # the first so many are trained on
    size: int
    seed: int

    def __call__(self, step: int) -> dict[Kind, dict[str, np.ndarray]]:
        rows = np.random.default_rng([self.seed, step]).integers(self.rows, size=self.size)
        rows.sort()  # files are read forwards
        return {
            kind: {
                "x": np.stack([inputs[rows] for inputs, _ in layers]),
                "bits": np.stack([packed[rows] for _, packed in layers]),
            }
            for kind, layers in self.maps.items()
        }


@dataclass(frozen=True)
class Choice:
    """Keeps each layer's best parameters in a file, whole or not at all."""

    found: Collection
    layers: Mapping[Kind, list[int]]
    first: int  # row held out
    path: Path

    def __call__(self, step: int, params: Params) -> None:
        del step
        best = self.best() if self.path.is_file() else {}
        for kind, layers in self.layers.items():
            new = self._measured(kind, layers, matrices(params[kind]))
            if kind in best:
                better = new["recall"] > best[kind]["recall"]
                for name, value in new.items():
                    best[kind][name][better] = value[better]
            else:
                best[kind] = new
        write_arrays(self.path, _flat(best))

    def best(self) -> dict[Kind, Params]:
        return _nested(read_arrays(self.path))

    def _measured(self, kind: Kind, layers: list[int], given: Params) -> dict[str, np.ndarray]:
        """The matrices of all layers as they are stored, and their recall."""
        each = [
            as_stored({name: np.asarray(x[place]) for name, x in given.items()})
            for place in range(len(layers))
        ]
        recall = [self._recall(kind, i, one) for i, one in zip(layers, each, strict=True)]
        new = {name: np.stack([one[name] for one in each]) for name in given}
        return new | {"recall": np.asarray(recall)}

    def _recall(self, kind: Kind, layer: int, matrices: Params) -> float:
        """With as many units as the layer takes, or without a density as its tokens need."""
        total = self.found.rows - self.first
        rows = slice(self.first, None, -(-total // CHOOSING_ROWS))
        needed = self.found.labels(kind, layer, rows)
        share = self.found.recipe.density if kind == "neurons" else self.found.recipe.heads
        units = by_density(needed.shape[1], share or max(float(needed.mean()), 1e-9))
        scores = scores_of(matrices, self.found.inputs(kind, layer)[rows])
        return float(recall_curve(scores, needed)[units - 1])


def _flat(nested: Mapping[Kind, Params]) -> dict[str, np.ndarray]:
    return {f"{kind}.{name}": x for kind, part in nested.items() for name, x in part.items()}


def _nested(flat: Mapping[str, np.ndarray]) -> dict[Kind, Params]:
    nested: dict[Kind, Params] = {}
    for full, value in flat.items():
        kind, name = full.split(".")
        nested.setdefault(kind, {})[name] = value
    return nested
