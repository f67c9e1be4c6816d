"""The tokenizer inside a GGUF file, rebuilt with `tokenizers`.

"gpt2" vocabularies are byte-level BPE; how text is split before the merges is named by
`tokenizer.ggml.pre` and kept here as one regular expression (or digit splitting) a name. "llama"
vocabularies are SentencePiece BPE: their merges are recovered from the piece scores, and unknown
characters fall back to byte pieces. Other models give a warning and no tokenizer.
"""

import warnings
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from jaxinfer.files import one_line
from jaxinfer.io.chat_template_files import gguf_templates
from jaxinfer.io.tokenizer import Tokenizer, prepend_token
from jaxinfer.typing import Json

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    "llama-bpe": rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",
    "qwen2": rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",
}
ALIASES = {
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "smaug-bpe": "llama-bpe",
    "falcon3": "llama-bpe",
    "deepseek-r1-qwen": "qwen2",
    "": "gpt-2",
    "default": "gpt-2",
    "phi-2": "gpt-2",
    "jina-es": "gpt-2",
    "mpt": "gpt-2",
    "olmo": "gpt-2",
}
_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6


def tokenizer_from_metadata(metadata: Json, where: str) -> Tokenizer | None:
    """The tokenizer that `metadata` describes; None, with a warning, if its kind is unknown."""
    model = metadata.get("tokenizer.ggml.model")
    if model is None:
        warnings.warn(f"{where} has no tokenizer; prompts must be token lists", stacklevel=2)
        return None
    tokens = _list(metadata, "tokens", str, where)
    if not tokens:
        raise ValueError(f"{where}: tokenizer.ggml.tokens is missing or empty")
    if len(set(tokens)) != len(tokens):
        tokens = _distinct(tokens)
    kinds = _list(metadata, "token_type", int, where) or [1] * len(tokens)
    if len(kinds) != len(tokens):
        raise ValueError(f"{where}: {len(kinds)} token types for {len(tokens)} tokens")
    if model == "gpt2":
        backend = _byte_level(metadata, tokens, where)
        add_bos = False
    elif model == "llama":
        backend = _sentencepiece(metadata, tokens, kinds, where)
        add_bos = True
    else:
        warnings.warn(
            f"{where}: tokenizer model {one_line(repr(model), 40)} is not supported (gpt2 and "
            "llama are); prompts must be token lists",
            stacklevel=2,
        )
        return None
    if backend is None:
        return None
    _add_special(backend, tokens, kinds)
    special = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if number is None:
            continue
        if type(number) is not int or not 0 <= number < len(tokens):
            raise ValueError(
                f"{where}: tokenizer.ggml.{key}_token_id is {number!r}, "
                f"expected 0..{len(tokens) - 1}"
            )
        special[f"{name}_token"] = tokens[number]
    if metadata.get("tokenizer.ggml.add_bos_token", add_bos) and "bos_token" in special:
        prepend_token(backend, special["bos_token"])
    templates = gguf_templates(metadata, where)
    turn_end = metadata.get("tokenizer.ggml.eot_token_id")
    return Tokenizer.from_backend(
        backend,
        special=special,
        eos_token_ids=[turn_end] if type(turn_end) is int and 0 <= turn_end < len(tokens) else [],
        chat_template=templates.default,
        tool_template=templates.tool_use,
    )


def _list(metadata: Json, name: str, kind: type, where: str) -> list:
    value = metadata.get(f"tokenizer.ggml.{name}", [])
    if not isinstance(value, list) or any(not isinstance(entry, kind) for entry in value):
        raise ValueError(f"{where}: tokenizer.ggml.{name} must be a list of {kind.__name__}")
    return value


def _distinct(tokens: list[str]) -> list[str]:
    """Padding rows of a vocabulary may repeat a text; only its first id can be encoded to."""
    seen: set[str] = set()
    result = []
    for number, token in enumerate(tokens):
        result.append(token if token not in seen else f"<|unused-{number}|>")
        seen.add(result[-1])
    return result


def _byte_level(metadata: Json, tokens: list[str], where: str) -> tokenizers.Tokenizer | None:
    name = metadata.get("tokenizer.ggml.pre", "default")
    name = ALIASES.get(name, name) if isinstance(name, str) else repr(name)
    if name in ("smollm", "codeshell", "exaone", "starcoder", "refact", "command-r"):
        first = pre_tokenizers.Digits(individual_digits=True)
        rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        splitter = pre_tokenizers.Sequence([first, rest])
    elif name == "gpt-2":
        splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    elif name in SPLITS:
        first = pre_tokenizers.Split(tokenizers.Regex(SPLITS[name]), "isolated")
        rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        splitter = pre_tokenizers.Sequence([first, rest])
    else:
        known = ", ".join(sorted({"smollm", "gpt-2", *SPLITS}))
        warnings.warn(
            f"{where}: pre-tokenizer {one_line(repr(name), 40)} is not supported (known: {known}); "
            "prompts must be token lists",
            stacklevel=3,
        )
        return None
    merges = []
    for entry in _list(metadata, "merges", str, where):
        left, _, right = entry.partition(" ")
        merges.append((left, right))
    vocab = {token: number for number, token in enumerate(tokens)}
    # Llama 3 takes a whole known word without merging
    model = _model(vocab, merges, where, ignore_merges=name == "llama-bpe")
    backend = tokenizers.Tokenizer(model)
    if name == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = splitter
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(
    metadata: Json, tokens: list[str], kinds: list[int], where: str
) -> tokenizers.Tokenizer:
    scores = _list(metadata, "scores", float, where)
    if len(scores) != len(tokens):
        raise ValueError(f"{where}: {len(scores)} token scores for {len(tokens)} tokens")
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    if type(unknown) is not int or not 0 <= unknown < len(tokens):
        raise ValueError(f"{where}: tokenizer.ggml.unknown_token_id {unknown!r} is not a token")
    vocab = {token: number for number, token in enumerate(tokens)}
    merges = []
    for number, token in enumerate(tokens):
        if kinds[number] != 1 or len(token) > 256:
            continue
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        merges += [
            (-scores[number], vocab[left], vocab[right], left, right)
            for left, right in pairs
            if left in vocab and right in vocab
        ]
    model = _model(
        vocab,
        [entry[3:] for entry in sorted(merges)],
        where,
        unk_token=tokens[unknown],
        fuse_unk=True,
        byte_fallback=_BYTE in kinds,
    )
    backend = tokenizers.Tokenizer(model)
    space: list[Any] = [normalizers.Replace(" ", "▁")]
    strip = []
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        space.insert(0, normalizers.Prepend("▁"))
        strip = [decoders.Strip(" ", 1, 0)]
    backend.normalizer = normalizers.Sequence(space)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _model(vocab: dict, merges: list[tuple[str, str]], where: str, **options: Any) -> models.BPE:
    try:
        return models.BPE(vocab=vocab, merges=merges, **options)
    except Exception as error:
        raise ValueError(f"{where}: the tokenizer's merges are wrong: {one_line(error)}") from error


def _add_special(backend: tokenizers.Tokenizer, tokens: list[str], kinds: list[int]) -> None:
    for kind, add in (
        (_CONTROL, backend.add_special_tokens),
        (_USER_DEFINED, backend.add_tokens),
    ):
        texts = [token for token, number in zip(tokens, kinds, strict=True) if number == kind]
        add([tokenizers.AddedToken(text, normalized=False) for text in texts if text])
