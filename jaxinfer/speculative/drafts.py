"""What may draft for a target, and the drafter that it gets."""

from dataclasses import replace
from typing import TypeVar

import numpy as np

from jaxinfer.arguments import of_kind, whole
from jaxinfer.decode.model import Model
from jaxinfer.models.recurrent import RecurrentDraft
from jaxinfer.speculative.drafters import Drafter, Method, ModelDrafter
from jaxinfer.speculative.lookup import LookupDrafter
from jaxinfer.speculative.recurrent import RecurrentDrafter

PROMPT_LOOKUP = "prompt-lookup"

OwnModel = TypeVar("OwnModel", bound=Model)


def early_exit(lm: OwnModel, layers: int) -> OwnModel:
    """The first layers of a model with its own final norm and head, as a draft of it.

    Args:
        lm: the model, whose arrays the draft shares.
        layers: how many of its layers, fewer than it has.

    Returns:
        A model of the same kind.

    Raises:
        ValueError: for no layers, or all of them.

    Example:
        >>> import jaxinfer as ji
        >>> lm = ji.load("tiny-llama")
        >>> draft = ji.early_exit(lm, 2)
        >>> draft.name, draft.config.num_layers
        ('tiny-llama[:2]', 2)
    """
    of_kind("lm", lm, Model, "an LM")
    layers = whole("layers", layers, least=0)
    if not 1 <= layers < lm.config.num_layers:
        raise ValueError(
            f"an early exit of {lm.config.num_layers} layers has 1 to {lm.config.num_layers - 1} "
            f"of them, got {layers}"
        )
    params = {**lm.params, "layers": tuple(lm.params["layers"][:layers])}
    return replace(lm, config=lm.config.first(layers), params=params, name=f"{lm.name}[:{layers}]")


def drafter_for(
    target: Model, draft: Model | RecurrentDraft | None, method: Method, support: int
) -> Drafter:
    """What fills the trees of `target` with the guesses of `draft`; None is prompt lookup.

    Raises:
        ValueError: the draft's tokens are not the target's, or it was trained for another one.
    """
    if draft is None:
        return LookupDrafter()
    if isinstance(draft, RecurrentDraft):
        if draft.config.hidden_size != target.config.hidden_size:
            raise ValueError(
                f"the draft continues states of {draft.config.hidden_size} numbers, the target has "
                f"{target.config.hidden_size}; give the target that it was trained for"
            )
        return RecurrentDrafter(size=max(min(support, draft.config.vocab_size), 1), method=method)
    check_vocabularies(target, draft)
    size = min(support, draft.config.vocab_size, target.config.vocab_size)
    return ModelDrafter(cfg=draft.config, size=max(size, 1), method=method)


def check_vocabularies(target: Model, draft: Model) -> None:
    """Refuses a draft whose token ids mean something else; a padded vocabulary may differ in
    size."""
    ours, theirs = target.tokenizer, draft.tokenizer
    if ours is not None and theirs is not None and ours is not theirs:
        shared = min(ours.vocab_size, theirs.vocab_size)
        probes = np.unique(np.linspace(0, shared - 1, 257).astype(int)).tolist()
        for token in probes:
            mine, other = (x.decode([token], skip_special=False) for x in (ours, theirs))
            if mine != other:
                raise ValueError(
                    f"token {token} is {mine!r} for the target and {other!r} for the draft; a "
                    "draft needs the target's tokenizer"
                )
    sizes = target.config.vocab_size, draft.config.vocab_size
    if max(sizes) - min(sizes) > max(sizes) // 8:
        raise ValueError(
            f"the target has {sizes[0]} tokens and the draft {sizes[1]}; a draft needs the "
            "target's tokenizer"
        )
