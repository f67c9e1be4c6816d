"""Folders of what methods of sparsity learned (`jaxinfer.sparsity.artefact`).

config.json          format, version, method, model identity, sizes, recipe, results, and for
                     each layer what it has (`LayerForm`), null where it stays dense
weights.safetensors  `layers.N.NAME`, about one byte per parameter (`jaxinfer.io.int8`)
"""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import jax

from jaxinfer.arrays import opened
from jaxinfer.fields import known_fields
from jaxinfer.files import (
    check_destination,
    one_line,
    quoted,
    read_json,
    replacing_folder,
    shipped_folder,
    write_json,
)
from jaxinfer.io.int8 import decoded, encoded
from jaxinfer.models.params import named_leaves
from jaxinfer.sparsity.artefact import SparsityArtefact
from jaxinfer.sparsity.form import LayerForm
from jaxinfer.sparsity.identity import SparsityConfig
from jaxinfer.sparsity.learned import LayerSparsity
from jaxinfer.typing import Json

FORMAT, VERSION = "jaxinfer-sparsity", 1
WHAT = "a sparsity artefact"
WEIGHTS, CONFIG = "weights.safetensors", "config.json"
MOST_CONFIG = 4 * 2**20  # bytes; a config of 1000 layers has half a million
NAMED = {
    name: f"checkpoints/{name}"
    for name in ("deja-vu-tiny-opt", "lte-tiny-opt", "lte-tiny-llama", "lte-smollm2-135m")
}
"""Artefacts that come with the library: their folders by name."""


def save_sparsity(
    folder: str | Path, artefact: SparsityArtefact, *, overwrite: bool = False
) -> None:
    """Writes a folder, whole or not at all; an older artefact there is replaced only with
    `overwrite`, and nothing else ever is."""
    from safetensors.numpy import save

    folder = Path(folder)
    check_destination(folder, is_sparsity, WHAT, overwrite=overwrite)
    forms = [None if layer is None else asdict(LayerForm.of(layer)) for layer in artefact.layers]
    record = {"format": FORMAT, "format_version": VERSION, **asdict(artefact.config)}
    with replacing_folder(folder) as temporary:
        arrays = named_leaves({"layers": artefact.layers})
        (temporary / WEIGHTS).write_bytes(save(encoded(arrays)))
        write_json(temporary / CONFIG, record | {"layers": forms})


def load_sparsity(
    source: str | Path, *, lookahead: float | None | Literal["stored"] = "stored"
) -> SparsityArtefact:
    """The artefact in a folder, or the one that comes with the library under a name.

    Args:
      source: the folder or the name.
      lookahead: what the caller expects of the routers, in layers; "stored" takes any.

    Raises:
      ValueError: it is damaged, or its routers were trained for another look-ahead. Sizes are held
        against the config and the file before anything is made of them.
    """
    folder = sparsity_folder(source)
    data = read_json(folder / CONFIG, MOST_CONFIG)
    if data.pop("format", None) != FORMAT or data.pop("format_version", None) != VERSION:
        raise ValueError(
            f"{folder} holds no sparsity artefact of version {VERSION}; train it again"
        )
    try:
        forms = data.pop("layers", None)
        config = SparsityConfig(**known_fields(SparsityConfig, data))
        artefact = SparsityArtefact(config, _layers(folder / WEIGHTS, config, forms))
    except ValueError as error:
        raise ValueError(f"cannot read the artefact in {folder}: {one_line(error)}") from error
    if lookahead not in ("stored", config.lookahead):
        raise ValueError(
            f"the routers in {folder} were trained for look-ahead {config.lookahead}, not "
            f"{lookahead}; use it as it is stored, or train others"
        )
    return artefact


def is_sparsity(folder: Path) -> bool:
    """Whether a folder holds such an artefact."""
    try:
        return read_json(folder / CONFIG, MOST_CONFIG).get("format") == FORMAT
    except ValueError:
        return False


def _layers(path: Path, config: SparsityConfig, forms: object) -> tuple[LayerSparsity | None, ...]:
    if not isinstance(forms, list) or len(forms) != config.num_layers:
        raise ValueError(f"{CONFIG} must describe {config.num_layers} layers, got {quoted(forms)}")
    shapes = {"layers": tuple(_abstract(config, form) for form in forms)}
    with opened(path) as file:
        found = decoded(file, named_leaves(shapes))
    return jax.tree.unflatten(jax.tree.structure(shapes), found.values())["layers"]


def _abstract(config: SparsityConfig, form: Json | None) -> LayerSparsity | None:
    return None if form is None else LayerForm.from_dict(form).abstract(config)


def sparsity_folder(source: str | Path) -> Path:
    """Where an artefact is, by its folder or name."""
    if str(source) in NAMED:
        folder = shipped_folder(NAMED[str(source)])
        if folder is None:
            raise ValueError(
                f"the sparsity artefact {source} is not installed; run from the source tree, or "
                "give a folder of one"
            )
        return folder
    folder = Path(os.path.expanduser(source))
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"no sparsity artefact at {one_line(source, 120)!r}: neither a folder of one nor the "
            f"name of one that comes with the library ({', '.join(NAMED) or 'there is none'}); "
            "train one with `jaxinfer train dejavu` or `jaxinfer train lte`"
        )
    return folder
