"""The tokens that the files beside tokenizer.json name: which are special, added, and with what id.

A Hugging Face folder says this in up to four places: tokenizer_config.json (named tokens such as
`eos_token`, extra tokens, and `added_tokens_decoder` with ids and flags), special_tokens_map.json,
added_tokens.json and tokenizer.json itself. As in transformers, `added_tokens_decoder` makes the
two older files count only for what it leaves open. Where tokenizer.json disagrees with the files
beside it, tokenizer.json holds, with a warning.
"""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxinfer.files import one_line, read_json
from jaxinfer.io.tokenizer_json import FLAGS, MOST_ADDED, added_tokens, ids_of, model_of
from jaxinfer.typing import Json

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_EXTRA = ("extra_special_tokens", "additional_special_tokens")
_FLAGS = (*FLAGS, "special")


@dataclass(frozen=True)
class NamedTokens:
    """What the files beside tokenizer.json say; every token is an entry of its `added_tokens`.

    `named` are tokens by name, `extra` special tokens without one; both may lack an id.
    `numbered` have one.
    """

    named: Mapping[str, Json] = field(default_factory=dict)
    extra: tuple[Json, ...] = ()
    numbered: tuple[Json, ...] = ()


def read_named_tokens(folder: Path, config: Mapping[str, Any]) -> NamedTokens:
    """The named and added tokens of the files in `folder`; `config` is its tokenizer_config."""
    decoder, older = (
        config.get("added_tokens_decoder"),
        _optional(folder / "special_tokens_map.json"),
    )
    newer = {name: value for name, value in config.items() if value is not None}
    merged = {**older, **newer} if decoder is not None else {**newer, **older}
    named = {
        name: _token(merged[name], f"{folder}: {name}", special=True)
        for name in _names(merged)
        if merged[name]
    }
    for name in _names(older):
        if name in newer and _content(older[name]) != _content(newer[name]):
            used = named.get(name, {}).get("content")
            warnings.warn(
                f"{folder}: special_tokens_map.json and tokenizer_config.json differ in {name}; "
                f"{_shown(used)} is used",
                stacklevel=2,
            )
    extra = []
    for key in _EXTRA:
        value = merged.get(key) or []
        entries = list(value.values()) if isinstance(value, dict) else value
        if not isinstance(entries, list) or len(entries) > MOST_ADDED:
            raise ValueError(f"{folder}: {key} must be a list of tokens, got {_shown(value)}")
        extra += [_token(entry, f"{folder}: {key}", special=True) for entry in entries]
    if decoder is not None:
        numbered = _decoded(decoder, folder)
    else:
        special = {token["content"] for token in (*named.values(), *extra)}
        numbered = _added(_optional(folder / "added_tokens.json"), special, folder)
    return NamedTokens(named, tuple(extra), tuple(numbered))


def with_tokens(data: Json, tokens: NamedTokens, room: int | None, where: object) -> Json:
    """The content of a tokenizer.json with the tokens that the files beside it name.

    A token without an id that the vocabulary does not have gets the next one, as in transformers,
    unless the model has no such row.

    Args:
      data: the parsed tokenizer.json.
      tokens: what the other files say.
      room: how many tokens the model knows, None if that is not known.
      where: the folder, for warnings.
    """
    added = {token["content"]: token for token in added_tokens(data)}
    known = dict(ids_of(model_of(data)))
    known |= {text: token["id"] for text, token in added.items()}
    taken = {number: text for text, number in known.items()}
    for token in tokens.numbered:
        content, number = token["content"], token["id"]
        held = added.get(content)
        if taken.get(number, content) != content or known.get(content, number) != number:
            _warn_id(token, known, taken, where)
        elif held is None:
            added[content] = token
            known[content], taken[number] = number, content
        elif any(held[flag] != token[flag] for flag in _FLAGS):
            warnings.warn(
                f"{where}: tokenizer_config.json and tokenizer.json differ in how "
                f"{_shown(content)} is matched or skipped; tokenizer.json holds",
                stacklevel=2,
            )
    following, missing = max(taken, default=-1) + 1, []
    for token in (*tokens.named.values(), *tokens.extra):
        content = token["content"]
        if not content or content in added:
            continue
        if content not in known and room is not None and following >= room:
            missing.append(content)
            continue
        added[content] = token | {"id": known.setdefault(content, following)}
        following = max(following, known[content] + 1)
    if missing:
        warnings.warn(
            f"{where} names special tokens that neither its vocabulary nor the model's {room} "
            f"tokens have; they are read as text: {_shown(', '.join(dict.fromkeys(missing)))}",
            stacklevel=2,
        )
    return data | {"added_tokens": list(added.values())}


def _warn_id(
    token: Json, known: Mapping[str, int], taken: Mapping[int, str], where: object
) -> None:
    content, number = token["content"], token["id"]
    instead = (
        known[content] if content in known else f"text, as {number} is {_shown(taken[number])}"
    )
    warnings.warn(
        f"{where}: tokenizer_config.json gives {_shown(content)} the id {number}, its vocabulary "
        f"reads it as {instead}; the vocabulary holds",
        stacklevel=3,
    )


def _names(mapping: Mapping[str, Any]) -> list[str]:
    """The keys that name a token, the usual ones first."""
    others = [k for k, v in mapping.items() if k.endswith("_token") and isinstance(v, str | dict)]
    return list(
        dict.fromkeys([name for name in (*NAMES, *others) if mapping.get(name) is not None])
    )


def _content(value: object) -> object:
    return value.get("content") if isinstance(value, dict) else value


def _token(value: object, what: str, special: bool | None = None) -> Json:
    """An added token from its text, or from its content and flags."""
    entry = {"content": value} if isinstance(value, str) else value
    content = entry.get("content") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(content, str):
        raise ValueError(f"{what} must be a text, got {_shown(value)}")
    is_special = entry.get("special", False) if special is None else special
    defaults = FLAGS | {"normalized": not is_special}
    flags = {name: entry.get(name, default) for name, default in defaults.items()}
    if not all(isinstance(flag, bool) for flag in (*flags.values(), is_special)):
        raise ValueError(f"{what} has a flag that is not true or false: {_shown(value)}")
    return {"content": content, "special": is_special, **flags}


def _decoded(decoder: object, folder: Path) -> list[Json]:
    what = f"{folder}: added_tokens_decoder"
    if not isinstance(decoder, dict) or len(decoder) > MOST_ADDED:
        raise ValueError(f"{what} must map ids to tokens, got {_shown(decoder)}")
    tokens = []
    for number, entry in decoder.items():
        if not (number.isascii() and number.isdigit() and len(number) < 9):
            raise ValueError(f"{what} has an id {_shown(number)}")
        tokens.append(_token(entry, what) | {"id": int(number)})
    return sorted(tokens, key=lambda token: token["id"])


def _added(mapping: Json, special: Iterable[str], folder: Path) -> list[Json]:
    special = set(special)
    tokens = []
    for content, number in mapping.items():
        if type(number) is not int or not 0 <= number < 2**24 or len(mapping) > MOST_ADDED:
            raise ValueError(
                f"{folder}: added_tokens.json gives {_shown(content)} an id {number!r:.40}"
            )
        tokens.append(_token(content, "added_tokens.json", content in special) | {"id": number})
    return sorted(tokens, key=lambda token: token["id"])


def _optional(path: Path) -> Json:
    return read_json(path) if path.is_file() else {}


def _shown(value: object) -> str:
    return one_line(repr(value), 80)
