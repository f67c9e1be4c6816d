"""The one door to `tokenizers`: the content of a tokenizer.json, checked, as a pipeline.

Every tokenizer passes here, also one that comes from vocab.json and merges.txt or from a GGUF file,
as the mapping that tokenizer.json would hold. It is read by tables of known fields with limits on
sizes (`tokenizer_parts` has the steps), so the Rust side sees only what it can handle. Settings of
training and batching are left out: dropout, truncation and padding.
"""

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import tokenizers

from jaxinfer.files import one_line
from jaxinfer.io.token_template import template_ids
from jaxinfer.io.tokenizer_parts import check_growth, read_steps, write_steps
from jaxinfer.typing import Json

MOST_BYTES = 64 * 2**20
MOST_BRACKETS = 4 * 2**20
MOST_TOKENS = 2**21
MOST_ID = 2**24
LONGEST_TOKEN = 4096
MOST_ADDED = 2**17
MOST_ADDED_TEXT = 2**20
LONGEST_AFFIX = 64
LONGEST_WORD = 1000
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
_OPTIONS = {
    "BPE": ("fuse_unk", "byte_fallback", "ignore_merges"),
    "Unigram": ("byte_fallback",),
    "WordPiece": (),
    "WordLevel": (),
}


@contextlib.contextmanager
def one_error(what: object) -> Iterator[None]:
    """Whatever the Rust side raises becomes one `ValueError`; `what` says what went wrong.

    It raises bare exceptions, and a panic derives from BaseException.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise ValueError(f"{what}: {one_line(error)}") from None


def parse(text: str, where: object) -> Json:
    """The JSON object of a tokenizer file, of bounded size."""
    size, brackets = len(text), text.count("[") + text.count("{")
    if size > MOST_BYTES or brackets > MOST_BRACKETS:
        raise ValueError(
            f"{where} has {size} characters and {brackets} lists; a tokenizer has at most "
            f"{MOST_BYTES} and {MOST_BRACKETS}"
        )
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {one_line(error)}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{where} holds a JSON {type(data).__name__}, expected an object")
    return data


def backend_of(data: Mapping[str, Any], where: object) -> tokenizers.Tokenizer:
    """The pipeline that `data`, the content of a tokenizer.json, describes.

    Args:
      data: the parsed file.
      where: the file, for errors, each one `ValueError` of one line.
    """
    try:
        checked = _checked(data, where)
        text = json.dumps(checked, ensure_ascii=False)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not a tokenizer we read: {one_line(error)}") from error
    with one_error(f"{where} is not a valid tokenizer.json"):
        return tokenizers.Tokenizer.from_str(text)


def ids_of(model: Mapping[str, Any]) -> dict[str, int]:
    """The texts and ids of the model of a tokenizer.json, whose types are checked."""
    vocab = model.get("vocab")
    if isinstance(vocab, list):
        vocab = {
            entry[0]: number
            for number, entry in enumerate(vocab)
            if isinstance(entry, list | tuple) and entry and isinstance(entry[0], str)
        }
    if not isinstance(vocab, dict) or len(vocab) > MOST_TOKENS:
        raise ValueError("its model has no vocabulary of a usable size")
    numbers = set()
    for token, number in vocab.items():
        if type(number) is not int or not 0 <= number < MOST_ID:
            raise ValueError(f"the id of {_shown(token)} is {_shown(number)}")
        if len(token) > LONGEST_TOKEN:
            raise ValueError(f"a token has {len(token)} characters, at most {LONGEST_TOKEN}")
        numbers.add(number)
    if len(numbers) != len(vocab):
        raise ValueError("two tokens of its vocabulary have the same id")
    return vocab


def added_tokens(data: Mapping[str, Any]) -> list[Json]:
    """The added tokens of a tokenizer.json: content, id, special and how each is matched."""
    value = data.get("added_tokens") or []
    if not isinstance(value, list) or len(value) > MOST_ADDED:
        raise ValueError(f"its added_tokens are not a list of at most {MOST_ADDED} tokens")
    tokens = [token for entry in value if (token := _added_token(entry))["content"]]
    if sum(len(token["content"]) for token in tokens) > MOST_ADDED_TEXT:
        raise ValueError(f"its added_tokens have more than {MOST_ADDED_TEXT} characters")
    return tokens


def model_of(data: Mapping[str, Any]) -> Json:
    """The model of a tokenizer.json with a type; some old files leave it out."""
    model = data.get("model")
    if not isinstance(model, dict):
        raise ValueError("it has no model")
    kind = model.get("type")
    if kind is None:
        kind = "BPE" if "merges" in model else "WordPiece"
        kind = "Unigram" if isinstance(model.get("vocab"), list) else kind
    if not isinstance(kind, str) or kind not in _OPTIONS:
        raise ValueError(f"its model is {_shown(kind)}, expected one of {', '.join(_OPTIONS)}")
    return model | {"type": kind}


def _checked(data: Mapping[str, Any], where: object) -> Json:
    parts = {
        part: read_steps(part, data.get(part))
        for part in ("normalizer", "pre_tokenizer", "decoder", "post_processor")
    }
    check_growth("normalizer and pre_tokenizer", parts["normalizer"] + parts["pre_tokenizer"])
    check_growth("decoder", parts["decoder"])
    model = _read_model(model_of(data))
    added = _numbered(added_tokens(data), model, where)
    added_ids = {token["content"]: token["id"] for token in added}
    known = ids_of(model)
    for text, number in template_ids(parts["post_processor"]):
        held = added_ids.get(text, known.get(text))
        if held != number:
            raise ValueError(
                f"its post_processor adds {_shown(text)} as {number}, "
                f"which has the id {held} in its vocabulary"
            )
    steps = {part: write_steps(part, value) for part, value in parts.items()}
    return {"version": "1.0", "added_tokens": added, "model": model, **steps}


def _read_model(model: Json) -> Json:
    kind = model["type"]
    read = {"type": kind}
    ids = ids_of(model)
    for name in _OPTIONS[kind]:
        value = model.get(name)
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"its model's {name} is {_shown(value)}, expected true or false")
        read[name] = bool(value)
    if kind == "Unigram":
        return read | _unigram(model)
    affixes = ("continuing_subword_prefix", "end_of_word_suffix")
    for name in {"BPE": affixes, "WordPiece": affixes[:1], "WordLevel": ()}[kind]:
        read[name] = _short_text(model.get(name), name) or ("" if kind == "WordPiece" else None)
    unknown = _short_text(model.get("unk_token"), "unk_token")
    read |= {"vocab": dict(ids), "unk_token": unknown}
    if kind == "BPE":
        read["merges"] = _merges(model.get("merges"), ids, read["continuing_subword_prefix"] or "")
    elif unknown is None:
        raise ValueError("its model has no unk_token")
    if kind == "WordPiece":
        longest = model.get("max_input_chars_per_word", 100)
        if type(longest) is not int or not 1 <= longest <= LONGEST_WORD:
            raise ValueError(f"its max_input_chars_per_word is not 1 to {LONGEST_WORD}")
        read["max_input_chars_per_word"] = longest
    return read


def _unigram(model: Json) -> Json:
    vocab, unknown = model["vocab"], model.get("unk_id")
    if not isinstance(vocab, list) or not all(_is_scored(entry) for entry in vocab):
        raise ValueError("its Unigram vocabulary is not a list of [text, score]")
    if len(ids_of(model)) != len(vocab):
        raise ValueError("two tokens of its vocabulary have the same text")
    if unknown is not None and (type(unknown) is not int or not 0 <= unknown < len(vocab)):
        raise ValueError(f"its unk_id is {_shown(unknown)}, expected 0..{len(vocab) - 1}")
    return {"vocab": vocab, "unk_id": unknown}


def _is_scored(entry: object) -> bool:
    return (
        isinstance(entry, list | tuple)
        and len(entry) == 2
        and isinstance(entry[0], str)
        and type(entry[1]) in (int, float)
        and abs(entry[1]) < 1e30
    )


def _short_text(value: object, name: str) -> str | None:
    if value is not None and not (isinstance(value, str) and len(value) <= LONGEST_AFFIX):
        raise ValueError(f"its model's {name} is {_shown(value)}, expected a short text")
    return value


def _merges(value: object, vocab: Mapping[str, int], prefix: str) -> list[list[str]]:
    if not isinstance(value, list):
        raise ValueError("its merges are not a list")
    merges = []
    for entry in value:
        if isinstance(entry, str) and entry.startswith("#version"):
            continue
        left = right = ""
        try:
            left, right = entry.split(" ") if isinstance(entry, str) else entry
            known = left in vocab and right in vocab and left + right[len(prefix) :] in vocab
        except (TypeError, ValueError):
            known = False
        if not known or not right.startswith(prefix):
            raise ValueError(f"the merge {_shown(entry)} is not of two tokens that make a third")
        merges.append([left, right])
    return merges


def _added_token(entry: object) -> Json:
    content = entry.get("content") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(content, str):
        raise ValueError(f"an added token is {_shown(entry)}, expected its content and id")
    number = entry.get("id")
    if type(number) is not int or not 0 <= number < MOST_ID:
        raise ValueError(f"the id of the added token {_shown(content)} is {_shown(number)}")
    if len(content) > LONGEST_TOKEN:
        raise ValueError(f"an added token has {len(content)} characters, at most {LONGEST_TOKEN}")
    special = entry.get("special", False)
    defaults = FLAGS | {"normalized": not special}
    token = {name: entry.get(name, default) for name, default in defaults.items()}
    token["special"] = special
    if not all(isinstance(flag, bool) for flag in token.values()):
        raise ValueError(f"a flag of the added token {_shown(content)} is not true or false")
    return {"id": number, "content": content, **token}


def _numbered(added: list[Json], model: Json, where: object) -> list[Json]:
    """`added` in the order of ids, with the ids that hold.

    Rust counts on from the vocabulary for tokens that are not in it, whatever ids the file gives
    them; where that would come out differently, they enter the vocabulary with their ids.
    """
    vocab = ids_of(model)
    texts = {number: text for text, number in vocab.items()}
    result: dict[str, Json] = {}
    for token in sorted(added, key=lambda token: token["id"]):
        content, number = token["content"], token["id"]
        held = result[content]["id"] if content in result else vocab.get(content, number)
        if held != number:
            warnings.warn(
                f"{where} gives the added token {_shown(content)} the id {number}, its vocabulary "
                f"{held}; the vocabulary's is used",
                stacklevel=2,
            )
        elif texts.setdefault(number, content) != content:
            raise ValueError(
                f"{_shown(content)} and {_shown(texts[number])} have the same id {number}"
            )
        result[content] = token | {"id": held}
    new = {text: token["id"] for text, token in result.items() if text not in vocab}
    if list(new.values()) != list(range(len(vocab), len(vocab) + len(new))):
        if model["type"] == "Unigram":
            raise ValueError("the ids of its added tokens do not follow those of its vocabulary")
        model["vocab"] |= new
    return list(result.values())


def _shown(value: object) -> str:
    return one_line(repr(value), 60)
