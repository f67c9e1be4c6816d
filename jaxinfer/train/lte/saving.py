"""What a training leaves: an artefact for the model that it began with, or a model of its own.

Where only feed-forward blocks or adapters were trained, an artefact has all there is; where the
whole model was, or where nothing became sparse, that is a model folder. Both are measured on
held-out windows as they are stored, not as they were trained.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxinfer.decode.model import Model
from jaxinfer.files import check_destination
from jaxinfer.io import checkpoint
from jaxinfer.io import sparsity as artefacts
from jaxinfer.io.checkpoint import Checkpoint, save_checkpoint
from jaxinfer.io.int8 import as_stored
from jaxinfer.io.sparsity import save_sparsity
from jaxinfer.io.tokenizer import Tokenizer
from jaxinfer.models.fingerprint import fingerprint
from jaxinfer.sparsity.artefact import SparsityArtefact
from jaxinfer.sparsity.identity import SparsityConfig
from jaxinfer.sparsity.learned import LayerSparsity
from jaxinfer.train.lte.measure import Measured, measure, with_unions
from jaxinfer.train.lte.recipe import LteRecipe
from jaxinfer.train.lte.training import Trained
from jaxinfer.typing import Params


def is_model(recipe: LteRecipe) -> bool:
    """Whether a recipe leaves a model of its own."""
    return recipe.trainable == "all" or recipe.method == "dense"


def check_out(folder: Path, recipe: LteRecipe, *, overwrite: bool = False) -> None:
    """Raises unless what a recipe leaves may be written to `folder`."""
    if is_model(recipe):
        check_destination(folder, checkpoint.is_checkpoint, checkpoint.WHAT, overwrite=overwrite)
    else:
        check_destination(folder, artefacts.is_sparsity, artefacts.WHAT, overwrite=overwrite)


def save_trained(
    folder: Path,
    model: Model,
    trained: Trained,
    held_out: Int[np.ndarray, "P T"],
    *,
    record: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes it; returns the results, with what is on disk as "stored". `record` is what else the
    recipe should say, such as the texts."""
    student, cfg = trained.student, model.config
    written = asdict(student.recipe) | (record or {})

    def results(stored: Measured) -> dict[str, Any]:
        return trained.results | {"stored": stored.record(cfg, student.recipe.block_size)}

    if not is_model(student.recipe):
        artefact = _artefact(model, trained)
        stored = measure(cfg, artefact.apply(cfg, model.params), held_out)
        pairs = zip(artefact.layers, stored.unions(), strict=True)
        layers = tuple(replace(layer, unions=shares) for layer, shares in pairs if layer)
        config = replace(artefact.config, recipe=written, results=results(stored))
        save_sparsity(folder, SparsityArtefact(config, layers), overwrite=overwrite)
        return config.results
    assert isinstance(model.tokenizer, Tokenizer | None)  # one that can be saved
    params = as_stored(student.sparse_model(trained.state))
    stored = measure(cfg, params, held_out)
    provenance = {"source": model.name, "recipe": written, "results": results(stored)}
    save_checkpoint(
        folder, Checkpoint(cfg, with_unions(params, stored), model.tokenizer, provenance),
        overwrite=overwrite, int8_rows=True,
    )  # fmt: skip
    return provenance["results"]


def _artefact(model: Model, trained: Trained) -> SparsityArtefact:
    """The artefact as a file gives it back, without unions, recipe and results."""
    student, state = trained.student, trained.state
    config = SparsityConfig.of(
        model.config, fingerprint(model.params), method="lte", model=model.name,
        block_size=student.recipe.block_size,
    )  # fmt: skip
    layers = [
        LayerSparsity(router=student.router(router), **_weights(trained, state, index))
        for index, router in enumerate(state["routers"])
    ]
    return SparsityArtefact(config, as_stored(tuple(layers)))


def _weights(trained: Trained, state: Params, index: int) -> dict[str, Any]:
    """What a layer has beside its router: new weights, or another order and adapters."""
    if "blocks" in state:
        return {"mlp": state["blocks"][index]}
    return {
        "permutation": np.asarray(trained.student.orders[index], np.int32),
        "adapters": state["adapters"][index],
    }
