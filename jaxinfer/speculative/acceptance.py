"""How often a drafted token is accepted: the measured vector and its file, and exact formulas.

Everywhere p_k is the *unconditional* probability that the k-th child of an accepted node is the one
accepted, not given that earlier children were rejected: the p_k of a node sum to at most 1, and
their sum up to k is the probability that one of the first k children is accepted.

The formulas hold for one node with target distribution P and draft distribution Q, both after
temperature and filters, in float64: Sequoia (arXiv 2402.12374, sections 3.2 and F), and the schemes
it is compared with. V is the vocabulary; leading axes `*B` are independent nodes. Nothing here
imports jax.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float, Float64, Int

from jaxinfer.files import read_json, write_text

FORMAT, VERSION = "jaxinfer-acceptance", 1

SLACK = 1e-6
"""By how much a sum of probabilities may miss 1: rounding of the file or of float32."""

MOST_HISTORIES = 2_000_000
"""Draw sequences that `exact_acceptance` enumerates at most, about 1 GiB with 8 tokens."""


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """A measured acceptance vector, or one row for each depth, and how it was measured.

    `width` and `reject` stand in the file for its readers; here they follow from p.
    """

    p: tuple[float, ...] | tuple[tuple[float, ...], ...]
    """p_1 ... p_W, in the order of the draws: never sorted. Rows, if any, start at depth 1."""
    temperature: float = 0.0
    """0 is greedy: p_k is how often the target's best token has rank k in the draft."""
    top_p: float = 1.0
    pair: tuple[str, str] = ("", "")
    """The names of target and draft."""
    samples: int = 0
    """Nodes measured."""
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "p", _tuples(as_table(self.p)))
        _require(
            0 <= self.temperature < math.inf,
            f"temperature is {self.temperature}, expected 0 or more",
        )
        _require(0 < self.top_p <= 1, f"top_p is {self.top_p}, expected above 0 and up to 1")
        for name in ("samples", "seed"):
            value = getattr(self, name)
            _require(value >= 0, f"{name} is {value}, expected 0 or more")

    @property
    def width(self) -> int:
        """W, the ranks measured."""
        return as_table(self.p).shape[-1]

    @property
    def reject(self) -> float | tuple[float, ...]:
        """The probability that none of W children is accepted, for each row if there are rows."""
        left = 1 - as_table(self.p).sum(axis=-1)
        return _tuples(np.asarray(np.maximum(left, 0.0)))

    def to_dict(self) -> dict[str, Any]:
        """The content of the file."""
        return {
            "format": FORMAT,
            "version": VERSION,
            **dataclasses.asdict(self),
            "reject": self.reject,
            "width": self.width,
        }

    def save(self, path: str | Path) -> None:
        """Writes the file in one step."""
        write_text(path, json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Acceptance":
        """The content of a file that `save` wrote.

        Raises:
            ValueError: naming the file and the field, if it is not such a file.
        """
        return cls.from_dict(read_json(Path(path)), path)

    @classmethod
    def from_dict(cls, data: dict[str, Any], what: object = "the acceptance") -> "Acceptance":
        """From `to_dict`; `what` names the source in errors."""
        try:
            return cls._checked(data)
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from error

    @classmethod
    def _checked(cls, data: dict[str, Any]) -> "Acceptance":
        form, version = data.get("format"), data.get("version")
        _require(form == FORMAT, f'expected "format": "{FORMAT}", got {form!r:.40}')
        _require(
            type(version) is int and version == VERSION,
            f"version is {version!r:.40}, expected {VERSION}",
        )
        names = {field.name for field in dataclasses.fields(cls)}
        extra = {"format", "version", "width", "reject"}
        unknown = sorted(set(data) - names - extra)
        _require(not unknown, f"unknown field {unknown[:1]}; expected {sorted(names | extra)}")
        missing = sorted((names | extra) - set(data))
        _require(not missing, f"field {missing[:1]} is missing")
        pair = data["pair"]
        _require(
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(x, str) for x in pair),
            f"pair is {pair!r:.80}, expected the names of target and draft",
        )
        made = cls(
            p=_tuples(as_table(_float64(data["p"], "p"))),
            temperature=_number(data, "temperature"),
            top_p=_number(data, "top_p"),
            pair=(pair[0], pair[1]),
            samples=_whole(data, "samples"),
            seed=_whole(data, "seed"),
        )
        width, reject = _whole(data, "width"), _float64(data["reject"], "reject")
        _require(width == made.width, f"width is {width}, but p has {made.width} ranks")
        left = np.array(made.reject)
        _require(
            reject.shape == left.shape and bool((abs(reject - left) <= SLACK).all()),
            "reject is not what the p of a row leave of 1",
        )
        return made


Ranks: TypeAlias = Acceptance | Sequence[float] | Sequence[Sequence[float]] | np.ndarray
"""p_k of ranks [B], or of depths and ranks [depth, B]."""


def as_table(acceptance: Ranks) -> Float64[np.ndarray, "..."]:
    """The p_k as an array, [B] or [depth, B], checked.

    Raises:
        ValueError: if a value lies outside 0 to 1, or a row sums to more than 1, as rates *given*
            that the earlier children were rejected do.
    """
    values = acceptance.p if isinstance(acceptance, Acceptance) else acceptance
    table = _float64(values, "p")
    if table.ndim not in (1, 2) or not table.size:
        raise ValueError(f"p has shape {table.shape}, expected [ranks] or [depth, ranks]")
    wrong = ~((table >= 0) & (table <= 1))  # NaN is neither
    if wrong.any():
        place = tuple(int(index[0]) for index in np.nonzero(wrong))
        raise ValueError(f"p{list(place)} is {table[place]}, expected a probability")
    most = float(table.sum(axis=-1).max())
    if most > 1 + SLACK:
        raise ValueError(
            f"p sums to {most:.6g}, expected at most 1: p_k counts acceptance of the k-th child "
            "among all nodes, not only those where the earlier children were rejected"
        )
    return table


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


def _float64(values: Any, name: str) -> np.ndarray:
    """A float64 array of numbers, from lists or an array."""
    flat = values.ravel().tolist() if isinstance(values, np.ndarray) else list(_leaves(values))
    if not all(_is_number(value) for value in flat):
        raise ValueError(f"{name} must hold numbers only")
    try:
        return np.array(values, np.float64)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{name} must hold numbers in rows of equal length") from error


def _leaves(values: Any, depth: int = 3) -> Iterable[Any]:
    if depth and isinstance(values, (list, tuple)):
        for value in values:
            yield from _leaves(value, depth - 1)
    else:
        yield values.item() if isinstance(values, np.generic) else values


def _tuples(table: np.ndarray) -> Any:
    rows = table.tolist()
    return tuple(map(tuple, rows)) if table.ndim == 2 else tuple(rows) if table.ndim else rows


def _number(data: dict[str, Any], name: str) -> float:
    value = data[name]
    _require(
        _is_number(value) and abs(value) <= sys.float_info.max,
        f"{name} is {value!r:.40}, expected a number",
    )
    return float(value)


def _whole(data: dict[str, Any], name: str) -> int:
    _require(type(data[name]) is int, f"{name} is {data[name]!r:.40}, expected a whole number")
    return data[name]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
