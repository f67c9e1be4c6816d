"""Exact acceptance of drafted tokens at one node, for Sequoia and what it is compared with.

Formulas for one node with target distribution P and draft distribution Q, both after temperature
and filters, in float64: Sequoia (arXiv 2402.12374, sections 3.2 and F), and the schemes it is
compared with. p_k is that of `jaxinfer.speculative.acceptance`. V is the vocabulary, K children;
leading axes `*B` are independent nodes. Nothing here imports jax.
"""

import math

import numpy as np
from jaxtyping import Float, Float64, Int

from jaxinfer.speculative.acceptance import SLACK

MOST_HISTORIES = 2_000_000
"""Draw sequences that `exact_acceptance` enumerates at most, about 1 GiB with 8 tokens."""


def sequoia_acceptance(
    p: Float[np.ndarray, "*B V"], q: Float[np.ndarray, "*B V"], draws: Int[np.ndarray, "*B K"]
) -> Float64[np.ndarray, "*B K"]:
    """p_k of the without-replacement verifier, for given draws in draw order.

    Its mean over draws is the unconditional p_k with a fraction of the noise of accepting and
    rejecting at random (Rao-Blackwell). After the support of Q is drawn, the draft is uniform over
    the tokens not drawn yet.

    Args:
        p: target distribution P.
        q: draft distribution Q.
        draws: distinct tokens, drawn one after another from Q without replacement.

    Raises:
        ValueError: for values that are not distributions, or draws that repeat.
    """
    target, draft = _distribution(p, "p"), _distribution(q, "q").copy()
    if draws.shape[-1] and not (draws.min() >= 0 and draws.max() < target.shape[-1]):
        raise ValueError(f"draws lie outside the vocabulary of {target.shape[-1]} tokens")
    if (np.diff(np.sort(draws, axis=-1), axis=-1) == 0).any():
        raise ValueError("a token is drawn twice; these draws are without replacement")
    residual, fresh = target, np.ones(target.shape, bool)
    reached = np.ones(target.shape[:-1])
    ranks = np.zeros(draws.shape)
    for rank in range(draws.shape[-1]):
        token = draws[..., rank : rank + 1]
        wanted = np.take_along_axis(residual, token, -1)[..., 0]
        offered = np.take_along_axis(draft, token, -1)[..., 0]
        # u * offered < wanted, u uniform, as a ratio that needs no division by 0
        accept = np.where(wanted >= offered, wanted > 0, wanted / np.where(offered > 0, offered, 1))
        ranks[..., rank] = reached * accept
        reached = reached * (1 - accept)
        residual = _residual(residual, draft)
        np.put_along_axis(fresh, token, False, -1)
        draft = _without(draft, fresh)
    return ranks


def exact_acceptance(
    p: Float[np.ndarray, "V"], q: Float[np.ndarray, "V"], children: int
) -> Float64[np.ndarray, "K"]:
    """p_k of the without-replacement verifier: all draw sequences, each with its probability.

    For small vocabularies: there are V! / (V - children + 1)! histories of rejected tokens.
    """
    target, draft = _distribution(p, "p"), _distribution(q, "q")
    size = len(target)
    _children(children, size)
    if math.perm(size, children - 1) > MOST_HISTORIES:
        raise ValueError(
            f"{children} children of {size} tokens have more than {MOST_HISTORIES} histories; "
            "average sequoia_acceptance over draws instead"
        )
    reached = np.ones(1)  # [S]: a history of rejected tokens, and its probability
    residual, drafts, fresh = target[None], draft[None], np.ones((1, size), bool)  # [S, V]
    ranks = np.zeros(children)
    for rank in range(children):
        ranks[rank] = reached @ np.minimum(residual, drafts).sum(axis=-1)
        rejected = reached[:, None] * np.maximum(drafts - residual, 0)  # [S, V]: the next token
        history, token = np.nonzero(rejected)
        reached, residual = rejected[history, token], _residual(residual, drafts)[history]
        fresh = fresh[history]
        fresh[np.arange(len(token)), token] = False
        drafts = _without(drafts[history], fresh)
    return ranks


def specinfer_acceptance(
    p: Float[np.ndarray, "*B V"], q: Float[np.ndarray, "*B V"], children: int
) -> Float64[np.ndarray, "*B K"]:
    """p_k of multi-round verification with replacement (SpecInfer, arXiv 2305.09781): exact.

    Children are independent draws from Q, which may repeat, so the draft of each round is Q itself.
    """
    residual, draft = _distribution(p, "p"), _distribution(q, "q")
    _children(children)
    reached, ranks = np.ones(residual.shape[:-1]), []
    for _ in range(children):
        accept = np.minimum(residual, draft).sum(axis=-1)
        ranks.append(reached * accept)
        reached = reached * np.maximum(1 - accept, 0)
        residual = _residual(residual, draft)
    return np.stack(ranks, axis=-1)


def top_k_acceptance(
    p: Float[np.ndarray, "*B V"], q: Float[np.ndarray, "*B V"], children: int
) -> Float64[np.ndarray, "*B K"]:
    """p_k where the children are the draft's likeliest tokens and one token drawn from P decides.

    Equally likely tokens are taken in order of their ids.
    """
    target, draft = _distribution(p, "p"), _distribution(q, "q")
    _children(children, target.shape[-1])
    best = np.argsort(-draft, axis=-1, kind="stable")[..., :children]
    return np.take_along_axis(target, best, -1)


def naive_acceptance(
    p: Float[np.ndarray, "*B V"], q: Float[np.ndarray, "*B V"], children: int
) -> Float64[np.ndarray, "*B K"]:
    """p_k where the children are independent draws from Q and one token drawn from P decides.

    Child k counts where it is the first to equal that token.
    """
    target, draft = _distribution(p, "p"), _distribution(q, "q")
    _children(children)
    ranks = [(target * draft * (1 - draft) ** k).sum(axis=-1) for k in range(children)]
    return np.stack(ranks, axis=-1)


def _residual(residual: np.ndarray, draft: np.ndarray) -> np.ndarray:
    """What the target still wants after a rejection: max(R - D, 0), normalised.

    Nothing left means that the rejection had probability 0: rounding, and R stays.
    """
    left = np.maximum(residual - draft, 0)
    total = left.sum(axis=-1, keepdims=True)
    return np.where(total > 0, left / np.where(total > 0, total, 1), residual)


def _without(draft: np.ndarray, fresh: np.ndarray) -> np.ndarray:
    """The draft on the tokens not drawn yet, normalised; uniform over them if it has none there."""
    left = np.where(fresh, draft, 0)
    left = np.where(left.sum(axis=-1, keepdims=True) > 0, left, fresh)
    return left / np.maximum(left.sum(axis=-1, keepdims=True), np.finfo(float).tiny)


def _distribution(values: np.ndarray, name: str) -> np.ndarray:
    """float64 distributions on the last axis, of sum 1 to the last digit."""
    array = np.asarray(values, np.float64)
    total = array.sum(axis=-1, keepdims=True)
    if not (np.isfinite(total).all() and (array >= 0).all() and (abs(total - 1) <= SLACK).all()):
        raise ValueError(f"{name} must hold distributions on its last axis, each of sum 1")
    return array / total


def _children(children: int, most: int | None = None) -> None:
    if children < 1 or (most is not None and children > most):
        expected = "1 or more" if most is None else f"1 to {most} (the vocabulary)"
        raise ValueError(f"children is {children}, expected {expected}")
