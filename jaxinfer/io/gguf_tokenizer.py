"""The tokenizer inside a GGUF file, as the tokenizer.json that it stands for.

"gpt2" vocabularies are byte-level BPE; how text is split before the merges is named by
`tokenizer.ggml.pre` (`gguf_pre`). "llama" vocabularies are SentencePiece BPE: their merges are
recovered from the piece scores, and unknown characters fall back to byte pieces. Other models give
a warning and no tokenizer. What a file leaves out is filled in as llama.cpp does it: special ids,
BOS, and the tokens that end a turn.
"""

import warnings
from collections.abc import Iterable

from jaxinfer.files import one_line
from jaxinfer.io.chat_template_files import gguf_templates
from jaxinfer.io.gguf_pre import DEFAULT, EOS_KEYS, EOS_TEXTS, EOS_UNLESS, PRE, Pre
from jaxinfer.io.tokenizer import Tokenizer
from jaxinfer.io.tokenizer_json import LONGEST_TOKEN, backend_of
from jaxinfer.typing import Json

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
LONGEST_PIECE = 256
MOST_CUTS = 2**23
"""Places where a SentencePiece vocabulary could be cut into two pieces; Gemma has 1.5 million."""
NAMED = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
DEFAULT_IDS = {"llama": {"bos": 1, "eos": 2, "unk": 0}, "gpt2": {"bos": 11, "eos": 11}}


def tokenizer_from_metadata(metadata: Json, where: str) -> Tokenizer | None:
    """The tokenizer that `metadata` describes; None, with a warning, if its kind is unknown."""
    model = metadata.get("tokenizer.ggml.model")
    if model in (None, "none", "no_vocab"):
        warnings.warn(f"{where} has no tokenizer; prompts must be token lists", stacklevel=2)
        return None
    if not isinstance(model, str) or model not in DEFAULT_IDS:
        warnings.warn(
            f"{where}: tokenizer model {one_line(repr(model), 40)} is not supported (gpt2 and "
            "llama are); prompts must be token lists",
            stacklevel=2,
        )
        return None
    tokens = _distinct(_list(metadata, "tokens", str, where))
    if not tokens:
        raise ValueError(f"{where}: tokenizer.ggml.tokens is missing or empty")
    kinds = _list(metadata, "token_type", int, where) or [1] * len(tokens)
    if len(kinds) != len(tokens):
        raise ValueError(f"{where}: {len(kinds)} token types for {len(tokens)} tokens")
    pre = _pre(metadata, where) if model == "gpt2" else Pre((), add_bos=True)
    if pre is None:
        return None
    if model == "gpt2":
        data = _byte_level(metadata, pre, tokens, where)
    else:
        data = _sentencepiece(metadata, tokens, kinds, where)
    special = _named_ids(metadata, DEFAULT_IDS[model], tokens, kinds, where)
    ends = _ends(metadata, tokens, where)
    data["added_tokens"] = _added(tokens, kinds, {*ends, *special.values()})
    data["post_processor"] = _around(metadata, pre.add_bos, special, tokens, where)
    templates = gguf_templates(metadata, where)
    return Tokenizer.from_backend(
        backend_of(data, where),
        special={f"{name}_token": tokens[number] for name, number in special.items()},
        eos_token_ids=ends,
        chat_template=templates.default,
        tool_template=templates.tool_use,
    )


def _list(metadata: Json, name: str, kind: type, where: str) -> list:
    value = metadata.get(f"tokenizer.ggml.{name}", [])
    kinds = (int, float) if kind is float else kind
    if not isinstance(value, list) or any(not isinstance(entry, kinds) for entry in value):
        raise ValueError(f"{where}: tokenizer.ggml.{name} must be a list of {kind.__name__}")
    return value


def _distinct(tokens: list[str]) -> list[str]:
    """Padding rows of a vocabulary may repeat a text; only its first id can be encoded to."""
    seen: set[str] = set()
    result = []
    for number, token in enumerate(tokens):
        result.append(token if token and token not in seen else f"<|unused-{number}|>")
        seen.add(result[-1])
    return result


def _pre(metadata: Json, where: str) -> Pre | None:
    """What the file's pre-tokenizer means; None, with a warning, if it is unknown."""
    name = metadata.get("tokenizer.ggml.pre")
    if name in (None, ""):
        warnings.warn(
            f"{where} does not name its pre-tokenizer (tokenizer.ggml.pre); llama.cpp's default "
            "is used, and texts may be split otherwise than in training: convert the model anew",
            stacklevel=3,
        )
        return DEFAULT
    if isinstance(name, str) and name in PRE:
        return PRE[name]
    warnings.warn(
        f"{where}: pre-tokenizer {one_line(repr(name), 40)} is not supported (known: "
        f"{', '.join(sorted(PRE))}); prompts must be token lists",
        stacklevel=3,
    )
    return None


def _byte_level(metadata: Json, pre: Pre, tokens: list[str], where: str) -> Json:
    merges = []
    for entry in _list(metadata, "merges", str, where):
        cut = entry.find(" ", 1)
        if cut < 0:
            raise ValueError(
                f"{where}: a merge is {one_line(repr(entry), 60)}, expected two tokens"
            )
        merges.append([entry[:cut], entry[cut + 1 :]])
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps: list[Json] = [
        {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Isolated",
            "invert": False,
        }
        for pattern in pre.splits
    ]
    steps.append(byte_level | {"use_regex": False})
    vocab = {token: number for number, token in enumerate(tokens)}
    model = {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": pre.ignore_merges}
    return {
        "model": model,
        "normalizer": {"type": pre.normalizer} if pre.normalizer else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": byte_level | {"use_regex": True},
    }


def _sentencepiece(metadata: Json, tokens: list[str], kinds: list[int], where: str) -> Json:
    scores = _list(metadata, "scores", float, where)
    if len(scores) != len(tokens):
        raise ValueError(f"{where}: {len(scores)} token scores for {len(tokens)} tokens")
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    if type(unknown) is not int or not 0 <= unknown < len(tokens):
        raise ValueError(f"{where}: tokenizer.ggml.unknown_token_id {unknown!r} is not a token")
    prefix = _flag(metadata, "add_space_prefix", True, where)
    pieces = [
        number
        for number, token in enumerate(tokens)
        if kinds[number] == 1 and len(token) <= LONGEST_PIECE
    ]
    if sum(len(tokens[number]) for number in pieces) > MOST_CUTS:
        raise ValueError(f"{where}: the vocabulary has more than {MOST_CUTS} characters")
    vocab = {token: number for number, token in enumerate(tokens)}
    merges = []
    for number in pieces:
        token = tokens[number]
        for cut in range(1, len(token)):
            left, right = vocab.get(token[:cut]), vocab.get(token[cut:])
            if left is not None and right is not None:
                merges.append((-scores[number], left, right))
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    model = {
        "type": "BPE",
        "vocab": vocab,
        "merges": [[tokens[left], tokens[right]] for _, left, right in sorted(merges)],
        "unk_token": tokens[unknown],
        "fuse_unk": True,
        "byte_fallback": _BYTE in kinds,
    }
    before = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
    after = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    return {
        "model": model,
        "normalizer": {"type": "Sequence", "normalizers": [*before, replace]},
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *after],
        },
    }


def _flag(metadata: Json, name: str, default: bool, where: str) -> bool:
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, bool):
        raise ValueError(f"{where}: tokenizer.ggml.{name} is {value!r:.40}, expected a bool")
    return value


def _id(metadata: Json, key: str, tokens: list[str], where: str) -> int | None:
    number = metadata.get(f"tokenizer.ggml.{key}_token_id")
    if number is not None and (type(number) is not int or not 0 <= number < len(tokens)):
        raise ValueError(
            f"{where}: tokenizer.ggml.{key}_token_id is {one_line(repr(number), 40)}, "
            f"expected 0..{len(tokens) - 1}"
        )
    return number


def _named_ids(
    metadata: Json, defaults: dict[str, int], tokens: list[str], kinds: list[int], where: str
) -> dict[str, int]:
    """The ids of the named tokens. A default counts only where the file has a control token."""
    ids = {}
    for name, key in NAMED.items():
        number, default = _id(metadata, key, tokens, where), defaults.get(name, len(tokens))
        if number is None and default < len(tokens) and kinds[default] in (_CONTROL, _UNKNOWN):
            number = default
        if number is not None:
            ids[name] = number
    return ids


def _ends(metadata: Json, tokens: list[str], where: str) -> list[int]:
    """The ids after which nothing follows: those the file numbers, and those told by their text."""
    numbered = [_id(metadata, key, tokens, where) for key in EOS_KEYS]
    places = {token: number for number, token in enumerate(tokens)}
    texts = [text for text in EOS_TEXTS if text in places]
    for text, others in EOS_UNLESS:
        if text in texts and all(other in texts for other in others):
            texts.remove(text)
    ids = [number for number in numbered if number is not None]
    return list(dict.fromkeys(ids + [places[text] for text in texts]))


def _added(tokens: list[str], kinds: list[int], special: Iterable[int]) -> list[Json]:
    """Tokens that are matched in a text before it is split; special ones are not shown."""
    special, added = set(special), []
    for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        is_special = kind in (_CONTROL, _UNKNOWN) or number in special
        if (is_special or kind == _USER_DEFINED) and len(token) <= LONGEST_TOKEN:
            added.append(
                {"id": number, "content": token, "special": is_special, "normalized": False}
            )
    return added


def _around(
    metadata: Json, add_bos: bool, special: dict[str, int], tokens: list[str], where: str
) -> Json | None:
    """The template that puts BOS before a text, and EOS after it where a file asks for that."""
    pieces: list[Json] = [{"Sequence": {"id": "A", "type_id": 0}}]
    used = {}
    for name, default, place in (("bos", add_bos, 0), ("eos", False, len(pieces) + 1)):
        key = f"add_{name}_token"
        wanted = _flag(metadata, key, default, where)
        if wanted and name not in special and f"tokenizer.ggml.{key}" in metadata:
            raise ValueError(f"{where}: {key} is true, but no {name}_token_id is given")
        if wanted and name in special:
            token = tokens[special[name]]
            pieces.insert(place, {"SpecialToken": {"id": token, "type_id": 0}})
            used[token] = {"id": token, "ids": [special[name]], "tokens": [token]}
    if not used:
        return None
    return {"type": "TemplateProcessing", "single": pieces, "special_tokens": used}
