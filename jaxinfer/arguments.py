"""Checks of what users pass: every refusal names the argument, what it is, and what is expected.

Arrays and their scalars count as Python's own values, a bool is no number, and NaN is in no range.
"""

import math
import operator
import os
import reprlib
from collections.abc import Collection
from numbers import Real
from typing import Any, TypeVar

import numpy as np

from jaxinfer.files import one_line

Choice = TypeVar("Choice", bound=str)

LARGEST = 2**31 - 1
"""What an int32 counts."""

LONGEST_PATH = 4095
"""Characters that Linux takes."""


class _Shown(reprlib.Repr):
    """`repr` of plain values, shortened; of anything else its kind, as its `repr` may be large."""

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if abs(x) < 10**40 else f"an integer of {x.bit_length()} bits"

    def repr_instance(self, x: Any, level: int) -> str:
        if isinstance(x, np.generic | bool | float | complex) or x is None or x is ...:
            return repr(x)
        if isinstance(getattr(x, "shape", None), tuple):
            return f"an array {getattr(x, 'dtype', '')}{list(x.shape)}"
        return repr(x) if isinstance(x, type) else f"a {type(x).__name__}"


_SHOWN = _Shown()
_SHOWN.maxstring = _SHOWN.maxother = 60


def shown(value: object) -> str:
    """What an argument is, on one short line."""
    return one_line(_SHOWN.repr(value), 120)


def whole(name: str, value: object, least: int = 1, most: int = LARGEST) -> int:
    """A whole number from `least` to `most`.

    Example:
      >>> whole("nodes", 0)
      Traceback (most recent call last):
      ValueError: nodes must be a whole number from 1 to 2147483647, got 0
    """
    number = _index(value)
    if number is None or not least <= number <= most:
        raise ValueError(
            f"{name} must be a whole number from {least} to {most}, got {shown(value)}"
        )
    return number


def real(name: str, value: object, least: float = -math.inf, most: float = math.inf) -> float:
    """A number from `least` to `most` that a float holds; infinite only where a bound is."""
    is_scalar = getattr(value, "ndim", None) == 0 and hasattr(value, "item")
    number = value.item() if is_scalar else value  # type: ignore[attr-defined]
    try:
        number = float(number) if _is_real(number) else math.nan  # type: ignore[arg-type]
    except OverflowError:
        number = math.nan
    if not least <= number <= most:
        limits = "" if (least, most) == (-math.inf, math.inf) else f" from {least:g} to {most:g}"
        raise ValueError(f"{name} must be a number{limits}, got {shown(value)}")
    return number


def flag(name: str, value: object) -> bool:
    """True or False."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be True or False, got {shown(value)}")
    return bool(value)


def one_of(name: str, value: object, known: Collection[Choice]) -> Choice:
    """One of some words."""
    for word in known:
        if isinstance(value, str) and value == word:
            return word
    words = ", ".join(map(repr, known))
    raise ValueError(f"{name} must be one of {words}; got {shown(value)}")


def of_kind(name: str, value: object, kinds: type | tuple[type, ...], expected: str) -> None:
    """An instance; `expected` says of what."""
    if not isinstance(value, kinds):
        raise ValueError(f"{name} must be {expected}, got {shown(value)}")


def path_text(name: str, value: object) -> str:
    """A path that the operating system can be asked for."""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text or len(text) > LONGEST_PATH:
        raise ValueError(f"{name} must be a path, got {shown(value)}")
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise ValueError(f"{name} must be a path, got {shown(value)}") from None
    return text


def _index(value: object) -> int | None:
    if isinstance(value, bool | np.bool_):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
