"""Damage to good files: to their bytes, to the values of JSON, and to the texts in both.

Every function takes the source of randomness and the good content, and returns a damaged one.
"""

import json
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

Mutation = Callable[[random.Random, bytes], bytes]

NUMBERS = (
    *(0, 1, -1, 2, 3, 255, 256, 4096, 65535, 65536, 10**6, 2**31 - 1, 2**31, 2**32, 2**53, 2**63),
    *(-(2**31), -(2**63), 2**64, 10**30, 10**400, -(10**400)),
    *(0.5, -0.0, 1e-40, 1e38, 1e39, 1e308, -1e308, float("nan"), float("inf"), -float("inf")),
)
TEXTS = (
    *("", " ", "a", "0", "-1", "nan", "name", "é", "日本", "\x00", "\x1b[2J\x1b]0;owned\x07"),
    *("\u202e\u2028", "\ud800", "\n", "a\nb", "../../x", "/", "x" * 300, "y" * 5000, "float32"),
)
WORDS = (0, 1, 2, 8, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**60, 2**62, 2**63, 2**64 - 1)
DEEP = 100_000  # brackets: more than any parser descends


def damaged_bytes(rng: random.Random, data: bytes) -> bytes:
    """Some bytes set, removed or repeated; numbers forged where headers have them."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        end = len(content) if rng.random() < 0.3 else min(len(content), 4096)
        place = rng.randrange(end) if end else 0
        kind = rng.randrange(6)
        if kind == 0:
            content[place : place + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            form = rng.choice(("<B", "<H", "<I", "<Q"))
            size = struct.calcsize(form)
            content[place : place + size] = struct.pack(form, rng.choice(WORDS) % 256**size)
        elif kind == 2:
            del content[place:]
        elif kind == 3:
            del content[place : place + rng.choice((1, 2, 8, 100))]
        elif kind == 4:
            content[place:place] = content[place : place + rng.choice((1, 8, 100))]
        else:
            content[place:place] = rng.choice((b"\x1b[2J", b"\xff\xfe", b"\x00", b"\n"))
    return bytes(content)


def damaged_json(rng: random.Random, data: bytes) -> bytes:
    """A JSON document with some of its values changed, removed, moved or added."""
    document = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        document = _changed(rng, document)
    text = json.dumps(document)
    if rng.random() < 0.03:
        text = text.replace("null", rng.choice(("[" * DEEP, '{"a":' * DEEP, "9" * 5000)), 1)
    if rng.random() < 0.02:
        text = rng.choice((text[: len(text) // 2], text + text, "[" * DEEP, "", "\ufeff" + text))
    return text.encode("utf-8", "surrogatepass")


def damaged_safetensors(rng: random.Random, data: bytes) -> bytes:
    """The header's values changed, with its length made right again but for some."""
    if rng.random() < 0.3 or len(data) < 8:
        return damaged_bytes(rng, data)
    (length,) = struct.unpack_from("<Q", data)
    header, rest = damaged_json(rng, data[8 : 8 + length]), data[8 + length :]
    size = rng.choice(WORDS) if rng.random() < 0.05 else len(header)
    return struct.pack("<Q", size) + header + rest


def damaged_text(fragments: Sequence[str]) -> Mutation:
    """Pieces of a text removed, repeated or replaced by one of `fragments`."""

    def mutate(rng: random.Random, data: bytes) -> bytes:
        text = data.decode("utf-8", "surrogateescape")
        for _ in range(rng.choice((1, 1, 2))):
            start = rng.randrange(len(text) + 1)
            stop = min(start + rng.choice((0, 0, 1, 5, 20)), len(text))
            piece = rng.choice((*fragments, *TEXTS, text[start:stop] * 2))
            text = text[:start] + piece + text[stop:]
        return text.encode("utf-8", "surrogatepass")

    return mutate


def odd_json(rng: random.Random, depth: int = 2) -> Any:
    """A JSON value that nobody expects."""
    kind = rng.randrange(10 if depth else 7)
    if kind < 3:
        return rng.choice(NUMBERS)
    if kind < 5:
        return rng.choice(TEXTS)
    if kind < 7:
        return rng.choice((None, True, False, [], {}))
    if kind == 7:
        return [odd_json(rng, depth - 1) for _ in range(rng.choice((1, 2, 5)))]
    if kind == 8:
        return {rng.choice(TEXTS): odd_json(rng, depth - 1) for _ in range(rng.choice((1, 2)))}
    return [odd_json(rng, 0)] * rng.choice((100, 10_000))


def _changed(rng: random.Random, value: Any) -> Any:
    """`value` with something changed at a place that a walk from the top finds."""
    if isinstance(value, dict | list) and value and rng.random() < 0.85:
        return _changed_inside(rng, value)
    if isinstance(value, str) and value[:1] in "{[" and value and rng.random() < 0.7:
        try:  # a document inside a text, as the metadata of safetensors files has it
            return json.dumps(_changed(rng, json.loads(value)))
        except ValueError:
            pass
    if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.4:
        near = (value + 1, value - 1, -value, 2 * value, json.dumps(value), [value])
        return rng.choice(near)
    return odd_json(rng)


def _changed_inside(rng: random.Random, value: Any) -> Any:
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key, other = rng.choice(keys), rng.choice(keys)
    changed = value.copy()
    kind = rng.random()
    if kind < 0.7:
        changed[key] = _changed(rng, value[key])
    elif kind < 0.8:
        del changed[key]
    elif kind < 0.87:
        changed[key] = value[other]
    elif kind < 0.93 and isinstance(value, dict):
        changed[rng.choice(TEXTS)] = changed.pop(key) if rng.random() < 0.5 else odd_json(rng)
    elif isinstance(value, list):
        changed.extend([value[key]] * rng.choice((1, 2, 1000)))
    else:
        changed[key] = [value[key]]
    return changed


BY_ENDING: dict[str, Mutation] = {
    ".json": damaged_json,
    ".zarray": damaged_json,
    ".safetensors": damaged_safetensors,
}
"""How files are damaged; others have their bytes damaged, and these a third of the time."""


def damaged(rng: random.Random, name: str, data: bytes) -> bytes:
    """The file `name` with its content damaged as its ending suggests."""
    ending = next((end for end in BY_ENDING if name.endswith(end)), None)
    if ending is None or rng.random() < 0.2:
        return damaged_bytes(rng, data)
    return BY_ENDING[ending](rng, data)
