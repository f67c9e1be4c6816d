"""How often a drafted token is accepted: the measured vector and its file.

Everywhere p_k is the *unconditional* probability that the k-th child of an accepted node is the one
accepted, not given that earlier children were rejected: the p_k of a node sum to at most 1, and
their sum up to k is the probability that one of the first k children is accepted. Nothing here
imports jax.
"""

import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

import numpy as np
from jaxtyping import Float64

from jaxinfer.arguments import path_text, real, shown, whole
from jaxinfer.files import read_json, write_text

FORMAT, VERSION = "jaxinfer-acceptance", 1

SLACK = 1e-6
"""By how much a sum of probabilities may miss 1: rounding of the file or of float32."""


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
        real("temperature", self.temperature, least=0, most=sys.float_info.max)
        real("top_p", self.top_p, least=sys.float_info.min, most=1)
        for name in ("samples", "seed"):
            whole(name, getattr(self, name), least=0, most=2**64)
        if not isinstance(self.pair, tuple) or [type(x) for x in self.pair] != [str, str]:
            raise ValueError(f"pair must be two names in a tuple, got {shown(self.pair)}")

    @property
    def width(self) -> int:
        """W, the ranks measured."""
        return as_table(self.p).shape[-1]

    @property
    def reject(self) -> float | tuple[float, ...]:
        """The probability that none of W children is accepted, for each row if there are rows."""
        left = 1 - as_table(self.p).sum(axis=-1)
        return _tuples(np.asarray(np.maximum(left, 0.0)))

    def to_dict(self) -> dict[str, object]:
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
        return cls.from_dict(read_json(Path(path_text("path", path))), path)

    @classmethod
    def from_dict(cls, data: Mapping[str, object], what: object = "the acceptance") -> "Acceptance":
        """From `to_dict`; `what` names the source in errors."""
        try:
            return cls._checked(data)
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from error

    @classmethod
    def _checked(cls, data: Mapping[str, object]) -> "Acceptance":
        form, version = data.get("format"), data.get("version")
        _require(form == FORMAT, f'expected "format": "{FORMAT}", got {shown(form)}')
        _require(
            type(version) is int and version == VERSION,
            f"version is {shown(version)}, expected {VERSION}",
        )
        names = {field.name for field in dataclasses.fields(cls)}
        extra = {"format", "version", "width", "reject"}
        unknown = sorted(set(data) - names - extra)
        _require(
            not unknown, f"unknown field {shown(unknown[:1])}; expected {sorted(names | extra)}"
        )
        missing = sorted((names | extra) - set(data))
        _require(not missing, f"field {missing[:1]} is missing")
        pair = data["pair"]
        if not (isinstance(pair, list) and [type(x) for x in pair] == [str, str]):
            raise ValueError(f"pair is {shown(pair)}, expected the names of target and draft")
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


def _float64(values: object, name: str) -> np.ndarray:
    """A float64 array of numbers, from lists or an array."""
    flat = values.ravel().tolist() if isinstance(values, np.ndarray) else list(_leaves(values))
    if not all(_is_number(value) for value in flat):
        raise ValueError(f"{name} must hold numbers only")
    try:
        return np.array(values, np.float64)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{name} must hold numbers in rows of equal length") from error


def _leaves(values: object, depth: int = 3) -> Iterable[object]:
    if depth and isinstance(values, (list, tuple)):
        for value in values:
            yield from _leaves(value, depth - 1)
    else:
        yield values.item() if isinstance(values, np.generic) else values


def _tuples(table: np.ndarray) -> Any:
    rows = table.tolist()
    return tuple(map(tuple, rows)) if table.ndim == 2 else tuple(rows) if table.ndim else rows


def _number(data: Mapping[str, object], name: str) -> float:
    value = data[name]
    if not _is_number(value) or abs(value) > sys.float_info.max:
        raise ValueError(f"{name} is {shown(value)}, expected a number")
    return float(value)


def _whole(data: Mapping[str, object], name: str) -> int:
    value = data[name]
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} is {shown(value)}, expected a whole number")
    return value


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
