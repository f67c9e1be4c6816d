"""Where names become drafts and methods of sparsity: what users may write for one, and what it
means."""

from collections.abc import Callable, Mapping
from typing import TypeAlias

from jaxinfer.arguments import shown
from jaxinfer.decode.model import Model
from jaxinfer.decode.speculation import Draft
from jaxinfer.models.recurrent import RecurrentDraft
from jaxinfer.plugins import Factories
from jaxinfer.sparsity.method import Sparsity
from jaxinfer.speculative.speculate import speculate

DraftLike: TypeAlias = Draft | Model | RecurrentDraft | str | None
"""How users write a draft: what `ji.speculate` returns, a smaller model of the same tokenizer, a
draft trained for this model, "prompt-lookup", or None for decoding token by token."""

SparsityLike: TypeAlias = Sparsity | str | Mapping[str, object] | None
"""How users write a method of sparsity: itself, a name, or a mapping with "name" and arguments;
None is the model as it is."""

SPARSITIES: Factories[Sparsity] = Factories(
    "sparsity method", "methods", "jaxinfer.sparsities", Sparsity, {}
)


def draft_of(model: Model, draft: DraftLike) -> Draft | None:
    """What drafts for `model`: a model or a name with the tree that pays on this machine.

    Raises:
      ValueError: there is no such draft, or its tokens are not the model's.
    """
    if draft is None or isinstance(draft, Draft):
        return draft
    return speculate(model, draft)


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


def sparsity_of(sparsity: SparsityLike) -> Sparsity | None:
    """The method that is meant; None for none. In names "-" counts as "_".

    Raises:
      ValueError: there is no such method, or it does not take these arguments.
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
    if isinstance(name, str) and name not in SPARSITIES.names():
        arguments["name"] = name.replace("-", "_")
    return SPARSITIES.make(arguments)
