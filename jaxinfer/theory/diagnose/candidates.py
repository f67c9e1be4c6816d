"""The policies between which each layer may choose, in sizes that suit the length of the texts."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from jaxinfer.cache.policy import Policy
from jaxinfer.cache.presets import resolve
from jaxinfer.files import one_line, quoted
from jaxinfer.lm import LM
from jaxinfer.models.stack import cache_geometry, check_cache

DEFAULTS = ("kivi2", "kivi4", "streaming", "h2o", "less", "full")
SHARE = 5  # an evicting candidate keeps a fifth of the text
SINKS, GROUP, RESIDUAL = 4, 32, 128
WORD = 16  # tokens in a word of 2 bits

Written: TypeAlias = Mapping[str, object]


@dataclass(frozen=True)
class Candidate:
    """A policy, what it is called, and how it is written in a policy file."""

    name: str
    written: Written
    policy: Policy


def candidates_for(
    lm: LM, wanted: Sequence[str | Written] | None, length: int
) -> tuple[list[Candidate], list[str]]:
    """The candidates, and why some of the default ones are left out.

    Args:
      lm: the model, which the policies must suit.
      wanted: names, mappings with "name" and arguments, or texts such as
        "streaming:window=60:sinks=4"; None takes those of `DEFAULTS` that suit the model. Without
        arguments a candidate is sized for `length`: what evicts keeps a fifth of it.
      length: tokens of a text.

    Raises:
      ValueError: one is unknown, does not suit the model, or is given twice, or there are none.
    """
    found: list[Candidate] = []
    reasons: list[str] = []
    for one in DEFAULTS if wanted is None else wanted:
        try:
            made = _candidate(lm, one, length)
        except ValueError as error:
            if wanted is not None:
                raise
            reasons.append(f"candidate {one} is left out: {one_line(error)}")
            continue
        if any(made.name == other.name for other in found):
            raise ValueError(f"candidate {quoted(made.name)} is given twice")
        found.append(made)
    if not found:
        raise ValueError("there are no candidates; name some, such as kivi2,kivi4,streaming,full")
    return found, reasons


def _candidate(lm: LM, one: str | Written, length: int) -> Candidate:
    given = _read(one) if isinstance(one, str) else dict(one)
    size_of = _SIZED.get(str(given.get("name"))) if len(given) == 1 else None
    written = given | (size_of(lm, length) if size_of else {})
    policy = resolve(written)
    geometry = cache_geometry(lm.config, length, lm.engine.dtype, lm.engine.backend)
    check_cache(lm.config, policy.sized(length), geometry, lm.params)
    name = one.strip() if isinstance(one, str) else json.dumps(given)
    return Candidate(name, written, policy)


def _read(text: str) -> dict[str, object]:
    """`kivi2:residual=32` as a mapping; values are JSON where they read as JSON, else text."""
    name, *parts = text.strip().split(":")
    found: dict[str, object] = {"name": name}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or not key.isidentifier() or key == "name":
            raise ValueError(
                f"a candidate is written NAME or NAME:key=value:..., got {quoted(text)}"
            )
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def _kivi(lm: LM, length: int) -> dict[str, object]:
    """A quarter of the text at most stays as it is."""
    group = min(GROUP, lm.config.head_dim)
    unit = max(group, WORD)
    return {"group": group, "residual": max(min(RESIDUAL, length // 4) // unit, 1) * unit}


def _streaming(lm: LM, length: int) -> dict[str, object]:
    return {"sinks": SINKS, "window": max(length // SHARE - SINKS, 1)}


def _h2o(lm: LM, length: int) -> dict[str, object]:
    half = max(length // SHARE // 2, 1)
    return {"heavy": half, "recent": half}


def _less(lm: LM, length: int) -> dict[str, object]:
    return {"base": "h2o", **_h2o(lm, length), "feature_maps": lm.name}


_SIZED: dict[str, Callable[[LM, int], dict[str, object]]] = {
    "kivi": _kivi,
    "kivi2": _kivi,
    "kivi4": _kivi,
    "streaming": _streaming,
    "h2o": _h2o,
    "less": _less,
}
