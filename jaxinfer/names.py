"""Where names become drafts: what users may write for one, and what it means."""

from typing import TypeAlias

from jaxinfer.decode.model import Model
from jaxinfer.decode.speculation import Draft
from jaxinfer.models.recurrent import RecurrentDraft
from jaxinfer.speculative.speculate import speculate

DraftLike: TypeAlias = Draft | Model | RecurrentDraft | str | None
"""How users write a draft: what `ji.speculate` returns, a smaller model of the same tokenizer, a
draft trained for this model, "prompt-lookup", or None for decoding token by token."""


def draft_of(model: Model, draft: DraftLike) -> Draft | None:
    """What drafts for `model`: a model or a name with the tree that pays on this machine.

    Raises:
      ValueError: there is no such draft, or its tokens are not the model's.
    """
    if draft is None or isinstance(draft, Draft):
        return draft
    return speculate(model, draft)
