"""The steps of a tokenizer.json that may reach `tokenizers`, and how much each lets a text grow.

A tokenizer.json is as untrusted as weights, and what its steps do wrong on the Rust side ends the
process: a chain of replacements that doubles the text 40 times fails to allocate, which cannot be
caught. So each step is read by a table of its fields, anything else is dropped or refused, and the
growth of the whole chain is bounded before a text is encoded.
"""

import base64
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxinfer.files import one_line
from jaxinfer.io.patterns import fewest_characters
from jaxinfer.io.token_template import MOST_STEPS, MOST_TEXT, is_id, is_text, read_template
from jaxinfer.typing import Json

MOST_REGEXES = 16
MOST_GROWTH = 32
MOST_ADDED_BYTES = 4096
CHARSMAP_GROWTH = 6
"""Bytes out for one byte in, at most, of SentencePiece's NFKC tables on running text."""


@dataclass(frozen=True)
class Growth:
    """A step makes at most `times * bytes + more` bytes of a text."""

    times: float = 1.0
    more: float = 0.0


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_character(value: object) -> bool:
    return isinstance(value, str) and len(value) == 1


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= MOST_TEXT


def _is_length(value: object) -> bool:
    return _is_count(value) and value != 0


def _one_of(*names: str) -> Callable[[object], bool]:
    return lambda value: isinstance(value, str) and value in names


def _or_none(check: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or check(value)


def _is_pattern(value: object) -> bool:
    if not isinstance(value, dict) or len(value) != 1:
        return False
    ((kind, text),) = value.items()
    return kind in ("String", "Regex") and isinstance(text, str) and text != ""


def _is_token(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and is_text(value[0]) and is_id(value[1])


_BEHAVIOR = _one_of("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")
_REPLACE = {"pattern": _is_pattern, "content": is_text}
_BYTE_LEVEL = {"add_prefix_space": _is_bool, "trim_offsets": _is_bool, "use_regex": _is_bool}
_METASPACE = {
    "replacement": _is_character,
    "add_prefix_space": _is_bool,
    "prepend_scheme": _one_of("first", "never", "always"),
    "split": _is_bool,
}
_ENDS = {"sep": _is_token, "cls": _is_token}
Fields = Mapping[str, Callable[[object], bool]]
STEPS: Mapping[str, Mapping[str, Fields]] = {
    "normalizer": {
        **{n: {} for n in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Nmt", "StripAccents")},
        "ByteLevel": {},
        "BertNormalizer": {
            "clean_text": _is_bool,
            "handle_chinese_chars": _is_bool,
            "strip_accents": _or_none(_is_bool),
            "lowercase": _is_bool,
        },
        "Strip": {"strip_left": _is_bool, "strip_right": _is_bool},
        "Precompiled": {"precompiled_charsmap": lambda value: isinstance(value, str)},
        "Replace": _REPLACE,
        "Prepend": {"prepend": is_text},
    },
    "pre_tokenizer": {
        **{n: {} for n in ("BertPreTokenizer", "Whitespace", "WhitespaceSplit", "UnicodeScripts")},
        "ByteLevel": _BYTE_LEVEL,
        "CharDelimiterSplit": {"delimiter": _is_character},
        "Metaspace": _METASPACE,
        "Split": {"pattern": _is_pattern, "behavior": _BEHAVIOR, "invert": _is_bool},
        "Punctuation": {"behavior": _BEHAVIOR},
        "Digits": {"individual_digits": _is_bool},
        "FixedLength": {"length": _is_length},
    },
    "decoder": {
        **{n: {} for n in ("ByteFallback", "Fuse")},
        "ByteLevel": _BYTE_LEVEL,
        "BPEDecoder": {"suffix": is_text},
        "WordPiece": {"prefix": is_text, "cleanup": _is_bool},
        "Metaspace": _METASPACE,
        "CTC": {"pad_token": is_text, "word_delimiter_token": is_text, "cleanup": _is_bool},
        "Replace": _REPLACE,
        # Rust counts the end of a token from beyond its start where the token is shorter
        "Strip": {"content": _is_character, "start": _is_count, "stop": lambda value: value == 0},
    },
    "post_processor": {
        "ByteLevel": _BYTE_LEVEL,
        "BertProcessing": _ENDS,
        "RobertaProcessing": _ENDS | {"trim_offsets": _is_bool, "add_prefix_space": _is_bool},
    },
}
_MEMBERS = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "decoder": "decoders",
    "post_processor": "processors",
}


def read_steps(part: str, value: object) -> list[Json]:
    """The steps of one part of a tokenizer.json, nested sequences flattened, fields checked.

    Args:
      part: "normalizer", "pre_tokenizer", "decoder" or "post_processor".
      value: what the file holds there; None for no steps.
    """
    steps = [_read_step(part, step) for step in _flattened(part, value, depth=0)]
    if len(steps) > MOST_STEPS:
        raise ValueError(f"its {part} has {len(steps)} steps, at most {MOST_STEPS} are read")
    patterns = [pattern for step in steps if (pattern := _regex(step)) is not None]
    if len(patterns) > MOST_REGEXES:
        raise ValueError(f"its {part} has {len(patterns)} regular expressions")
    for pattern in patterns:
        try:
            fewest_characters(pattern)
        except ValueError as error:
            shown = one_line(repr(pattern), 60)
            raise ValueError(f"its {part}'s regular expression {shown}: {error}") from error
    return steps


def write_steps(part: str, steps: list[Json]) -> Json | None:
    """The form in which tokenizer.json holds `steps`."""
    if len(steps) < 2:
        return steps[0] if steps else None
    return {"type": "Sequence", _MEMBERS[part]: steps}


def check_growth(what: str, steps: list[Json]) -> None:
    """ValueError if `steps`, one after the other, may make a text much longer."""
    times, more = 1.0, 0.0
    for step in steps:
        growth = _growth(step)
        times, more = times * growth.times, more * growth.times + growth.more
        if times > MOST_GROWTH or more > MOST_ADDED_BYTES:
            raise ValueError(
                f"its {what} may make a text {times:.0f} times as long and {more:.0f} bytes "
                f"longer; at most {MOST_GROWTH} times and {MOST_ADDED_BYTES} bytes are allowed"
            )
    if sum(step["type"] == "Precompiled" for step in steps) > 1:
        raise ValueError(f"its {what} has more than one precompiled table")


def _flattened(part: str, value: object, depth: int) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, dict) or value.get("type") != "Sequence":
        return [value]
    members = value.get(_MEMBERS[part])
    if not isinstance(members, list) or len(members) > MOST_STEPS or depth > 3:
        raise ValueError(
            f"its {part} has a Sequence that is not a list of at most {MOST_STEPS} steps"
        )
    flat = [step for member in members for step in _flattened(part, member, depth + 1)]
    if len(flat) > MOST_STEPS:
        raise ValueError(f"its {part} has more than {MOST_STEPS} steps")
    return flat


def _read_step(part: str, step: object) -> Json:
    kind = step.get("type") if isinstance(step, dict) else None
    if isinstance(step, dict) and part == "post_processor" and kind == "TemplateProcessing":
        return read_template(step)
    if not isinstance(step, dict) or not isinstance(kind, str) or kind not in STEPS[part]:
        shown = one_line(repr(step if kind is None else kind), 60)
        raise ValueError(f"its {part} {shown} is not one of {', '.join(sorted(STEPS[part]))}")
    fields = STEPS[part][kind]
    for name, check in fields.items():
        if name in step and not check(step[name]):
            shown = one_line(repr(step[name]), 60)
            raise ValueError(f"its {part} {kind} has a {name} that cannot be: {shown}")
    if "pattern" in fields and "pattern" not in step:
        raise ValueError(f"its {part} {kind} has no pattern")
    if kind == "Precompiled":
        _check_charsmap(step.get("precompiled_charsmap", ""))
    return {"type": kind} | {name: step[name] for name in fields if name in step}


def _regex(step: Json) -> str | None:
    return step["pattern"].get("Regex") if "pattern" in step else None


def _growth(step: Json) -> Growth:
    kind = step["type"]
    if kind == "Replace":
        ((form, pattern),) = step["pattern"].items()
        content = len(step.get("content", "").encode())
        least = len(pattern.encode()) if form == "String" else fewest_characters(pattern)
        return Growth(max(1.0, content / least) if least else 1.0 + content, content)
    if kind == "Prepend":
        return Growth(more=len(step.get("prepend", "").encode()))
    if kind == "Metaspace":
        return Growth(3.0, 4.0)
    times = {"NFC": 3, "NFD": 3, "NFKC": 11, "NFKD": 11, "Lowercase": 2, "BertNormalizer": 12}
    times |= {"Precompiled": CHARSMAP_GROWTH, "ByteLevel": 2, "WordPiece": 2}
    return Growth(float(times.get(kind, 1)))


def _check_charsmap(text: str) -> None:
    """SentencePiece's table: a trie of 4-byte units, then texts that each end in a zero byte.

    Rust walks the trie unchecked: a unit at i leads to the units (i ^ offset) ^ byte, and with a
    leaf to one that holds where a text starts.
    """
    wrong = ValueError("its precompiled table is not one of SentencePiece")
    try:
        data = base64.b64decode(text, validate=True)
        (size,) = struct.unpack_from("<I", data)
        texts = data[4 + size :]
        texts.decode()
    except (ValueError, struct.error) as error:
        raise wrong from error
    if size == 0 or size % 4 or not texts.endswith(b"\0"):
        raise wrong
    units = np.frombuffer(data, "<u4", size // 4, 4)
    places = np.arange(len(units), dtype=np.uint32)
    inner = (units >> 31 == 0) & (units != 0)
    units, places = units[inner], places[inner]
    following = places ^ ((units >> 10) << ((units & 512) >> 6))
    if len(following) and (following | 255).max() >= size // 4:
        raise wrong
    starts = np.frombuffer(data, "<u4", size // 4, 4)[following[units & 256 != 0]] & (2**31 - 1)
    if len(starts) and starts.max() >= len(texts):
        raise wrong
    if ((np.frombuffer(texts, np.uint8)[starts] & 0xC0) == 0x80).any():
        raise wrong
    longest = max(map(len, texts.split(b"\0")))
    if longest > 64:
        raise ValueError(f"its precompiled table replaces a character by {longest} bytes")
