"""Where names become objects: what users may write for a policy or a draft, and what it means."""

from typing import TypeAlias

from jaxinfer.cache.policy import Policy
from jaxinfer.cache.presets import PolicyLike, resolve
from jaxinfer.decode.model import Model
from jaxinfer.decode.speculation import Draft
from jaxinfer.models.recurrent import RecurrentDraft
from jaxinfer.speculative.speculate import speculate

DraftLike: TypeAlias = Draft | Model | RecurrentDraft | str | None
"""How users write a draft: what `ji.speculate` returns, a smaller model of the same tokenizer, a
draft trained for this model, "prompt-lookup", or None for decoding token by token."""


def policy_of(policy: PolicyLike) -> Policy | None:
    """The policy that is meant; None is left to those who have a default of their own.

    Raises:
      ValueError: there is no such policy, or it does not take these arguments.
    """
    return None if policy is None else resolve(policy)


def draft_of(model: Model, draft: DraftLike) -> Draft | None:
    """What drafts for `model`: a model or a name with the tree that pays on this machine.

    Raises:
      ValueError: there is no such draft, or its tokens are not the model's.
    """
    if draft is None or isinstance(draft, Draft):
        return draft
    return speculate(model, draft)
