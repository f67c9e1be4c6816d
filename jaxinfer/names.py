"""Where names become drafts and methods of sparsity: what users may write for one, and what it
means."""

import os
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeAlias

from jaxinfer.arguments import path_text, shown
from jaxinfer.decode.model import Model
from jaxinfer.decode.speculation import Draft
from jaxinfer.io.sparsity import CONFIG, NAMED, is_sparsity, load_sparsity, sparsity_folder
from jaxinfer.models.recurrent import RecurrentDraft
from jaxinfer.plugins import Factories
from jaxinfer.sparsity.artefact import SparsityArtefact
from jaxinfer.sparsity.baseline import BASELINES, Baseline
from jaxinfer.sparsity.method import Sparsity
from jaxinfer.sparsity.trained import Trained
from jaxinfer.speculative.speculate import speculate

DraftLike: TypeAlias = Draft | Model | RecurrentDraft | str | None
"""How users write a draft: what `ji.speculate` returns, a smaller model of the same tokenizer, a
draft trained for this model, "prompt-lookup", or None for decoding token by token."""

SparsityLike: TypeAlias = Sparsity | str | Mapping[str, object] | None
"""How users write a method of sparsity: itself, a name ("lte"), the name or folder of an artefact
("lte-tiny-opt"), or a mapping with "name" and arguments; None is the model as it is."""

ArtefactLike: TypeAlias = SparsityArtefact | str | os.PathLike[str] | None
"""How users write a trained artefact: itself, its folder, or the name of one that comes with the
library; None, where the method is given by its name, is the one for the model."""


def draft_of(model: Model, draft: DraftLike) -> Draft | None:
    """What drafts for `model`: a model or a name with the tree that pays on this machine.

    Raises:
      ValueError: there is no such draft, or its tokens are not the model's.
    """
    if draft is None or isinstance(draft, Draft):
        return draft
    return speculate(model, draft)


def deja_vu(
    source: ArtefactLike = None,
    density: float | None = None,
    heads: float | None = None,
    keys: str = "always",
) -> Sparsity:
    """Only the neurons, and groups of heads, that predictors expect to matter for a token: DejaVu's
    contextual sparsity (arXiv 2310.17157). No weight is changed.

    Args:
      source: predictors that were trained for the model, see `ArtefactLike`.
      density: the share of the neurons that a token uses, in (0, 1], on average over layers: more
        where predictors find less with few. None is what the artefact says, layer by layer.
      heads: the share of the groups of query heads with their key-value head, likewise.
      keys: when keys and values of skipped heads are made: "always" with the token, or "deferred"
        until a head is used, at the latest at every 16th token. Both give the same.

    Raises:
      ValueError: there is no such artefact, a share is out of range, or `keys` names no way.
    """
    artefact = _artefact("deja_vu", source)
    return Trained(name="deja_vu", artefact=artefact, density=density, heads=heads, keys=keys)


def lte(source: ArtefactLike = None) -> Sparsity:
    """Blocks of neurons that a trained router opens token by token, in blocks that were trained for
    it: Learn-To-be-Efficient (arXiv 2402.06126). How many are open was learned.

    Args:
      source: routers, and weights or adapters, that were trained for the model, see
        `ArtefactLike`.

    Raises:
      ValueError: there is no such artefact.
    """
    return Trained(name="lte", artefact=_artefact("lte", source))


SPARSITIES: Factories[Sparsity] = Factories(
    "sparsity method",
    "methods",
    "jaxinfer.sparsities",
    Sparsity,
    {"deja_vu": deja_vu, "lte": lte} | {name: partial(Baseline, name=name) for name in BASELINES},
)


def register_sparsity(name: str, factory: Callable[..., Sparsity]) -> None:
    """Makes a method of your own known by name, also to the command line of this process.

    An installed package does the same for every process with an entry point of the group
    `jaxinfer.sparsities` that names the factory.

    Args:
        name: as in `lm.generate(sparsity=name)` or `{"name": name, ...}`.
        factory: returns a `Sparsity`; its arguments are those of the mapping.

    Raises:
        ValueError: for a name that is taken.
    """
    SPARSITIES.register(name, factory)


def sparsity_of(sparsity: SparsityLike, model: str = "") -> Sparsity | None:
    """The method that is meant; None for none. In names of methods "-" and "_" are alike.

    Args:
      sparsity: see `SparsityLike`.
      model: the name of the model, whose artefact a method without `source` takes.

    Raises:
      ValueError: there is no such method or artefact, or it does not take these arguments.
    """
    if sparsity is None or isinstance(sparsity, Sparsity):
        return sparsity
    if not isinstance(sparsity, str | Mapping):
        raise ValueError(
            "sparsity must be a Sparsity, a name, or a mapping with 'name' and arguments, got "
            f"{shown(sparsity)}"
        )
    arguments = {"name": sparsity} if isinstance(sparsity, str) else dict(sparsity)
    name = arguments.get("name")
    if isinstance(name, str):
        known = {_dashed(one): one for one in SPARSITIES.names()}
        if _dashed(name) in known:
            arguments["name"] = known[_dashed(name)]
        elif _is_artefact(name):
            arguments |= {"name": _loaded(name).config.method, "source": name}
    shipped = _dashed(f"{arguments.get('name')}-{model}")
    if shipped in NAMED and "source" not in arguments:
        arguments["source"] = shipped
    return SPARSITIES.make(arguments)


def _artefact(method: str, source: ArtefactLike) -> SparsityArtefact:
    """The artefact that is meant, which must be of that method."""
    if source is None:
        raise ValueError(
            f"{method} needs source, what it has learned for the model: a folder, or one of "
            f"{', '.join(name for name in NAMED if name.startswith(_dashed(method))) or 'none yet'}"
        )
    artefact = source if isinstance(source, SparsityArtefact) else _loaded(source)
    if artefact.config.method != method:
        raise ValueError(
            f"{shown(source)} is an artefact of {artefact.config.method}, not of {method}; use "
            f"ji.{artefact.config.method}"
        )
    return artefact


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _is_artefact(name: str) -> bool:
    try:
        return name in NAMED or is_sparsity(Path(os.path.expanduser(path_text("name", name))))
    except (ValueError, OSError):
        return False


def _loaded(source: object) -> SparsityArtefact:
    """The artefact of a folder or name. It is read again only when the folder was replaced, so that
    one method is given by the same name in every call."""
    folder = sparsity_folder(path_text("source", source))
    stamp = (folder / CONFIG).stat()
    return _read(folder, stamp.st_ino, stamp.st_mtime_ns)


@lru_cache(maxsize=4)
def _read(folder: Path, inode: int, written_ns: int) -> SparsityArtefact:
    return load_sparsity(folder)
