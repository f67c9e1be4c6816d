"""From which cache leaf the values of a program come; see `jaxinfer.inspection.copies`."""

from dataclasses import dataclass, replace
from typing import Any

from jaxinfer.inspection.hlo_text import Computation


@dataclass(frozen=True, order=True)
class Source:
    """The cache leaf that a value derives from; of several the largest in this order."""

    is_whole: bool = True  # else one block of a read
    bytes: int = 0  # 0: from no leaf
    name: str = ""
    is_kept: bool = False  # an enclosing loop hands the leaf on unchanged


NOTHING = Source(is_whole=False)
Taint = Any
"""The `Source` of a value; a list of these for a tuple."""


def handed_on(body: Computation) -> set[int]:
    """The places of a loop's state that its body hands on as it got them."""
    if body.root.opcode != "tuple":
        return set()
    origins = ((i, body.instructions[name]) for i, name in enumerate(body.root.operands))
    return {
        place
        for place, origin in origins
        if origin.opcode == "get-tuple-element"
        and int(origin.attribute("index") or 0) == place
        and body.instructions[origin.operands[0]].opcode == "parameter"
    }


def keeping(state: Taint, kept: set[int]) -> Taint:
    """The state of a loop, inside of which the leaves at the places `kept` do not change."""
    if not isinstance(state, list):
        return state
    return [
        replace(taint, is_kept=place in kept) if isinstance(taint, Source) else taint
        for place, taint in enumerate(state)
    ]


def peak(taint: Taint) -> Source:
    return max(map(peak, taint), default=NOTHING) if isinstance(taint, list) else taint


def join(a: Taint, b: Taint) -> Taint:
    """Of a loop's turns or of branches."""
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [join(x, y) for x, y in zip(a, b, strict=True)]
    if isinstance(a, list) and not isinstance(b, list):
        return [join(x, b) for x in a]
    if isinstance(b, list) and not isinstance(a, list):
        return [join(a, y) for y in b]
    return replace(max(peak(a), peak(b)), is_kept=False)
