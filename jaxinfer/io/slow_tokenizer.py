"""Folders with vocab.json and merges.txt but no tokenizer.json, built by their `tokenizer_class`.

How text is split, normalized and joined is not in these files but in the code of the class that
tokenizer_config.json names. The class of the installed transformers is asked for its pipeline, by
handing it data: a vocabulary, merges, and options of known types. It never sees the folder, so
nothing in there can be executed or make it fetch anything; a class that is not part of transformers
is refused.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxinfer.files import one_line, read_text
from jaxinfer.io.special_tokens import NAMES, NamedTokens
from jaxinfer.io.tokenizer_json import ids_of, one_error, parse
from jaxinfer.typing import Json

OPTIONS = ("add_prefix_space", "add_bos_token", "add_eos_token", "trim_offsets", "legacy")
UNSAID = ("PreTrainedTokenizer", "TokenizersBackend", "PythonBackend")
CLASSES = {
    "gpt_neox": "GPTNeoXTokenizer",
    "mpt": "GPTNeoXTokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
}
"""The class of a model type whose folder names none; GPT-2's otherwise."""


def slow_tokenizer(
    folder: Path, config: Mapping[str, Any], model_type: object, tokens: NamedTokens
) -> tuple[Json, NamedTokens]:
    """The tokenizer.json that the class of a slow folder stands for, and the tokens it names.

    Args:
      folder: holds vocab.json and merges.txt.
      config: its tokenizer_config.json.
      model_type: what config.json says the model is.
      tokens: what the folder's files name; the class adds its defaults.
    """
    vocab = parse(read_text(folder / "vocab.json"), folder / "vocab.json")
    merges = _merges(folder / "merges.txt")
    name = _class_name(folder, config, model_type)
    options: dict[str, Any] = {key: config[key] for key in OPTIONS if config.get(key) is not None}
    for key, value in options.items():
        if not isinstance(value, bool):
            raise ValueError(f"{folder}: {key} must be true or false, got {_shown(value)}")
    options |= {key: token["content"] for key, token in tokens.named.items() if key in NAMES}
    what = f"{folder}: vocab.json and merges.txt are not those of a {one_line(name, 60)}"
    try:
        ids = dict(ids_of({"vocab": vocab}))
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    with one_error(what):
        made = _class(name, folder)(vocab=dict(ids), merges=merges, **options)
        data = parse(made.backend_tokenizer.to_str(), folder)
        defaults = {key: str(value) for key, value in made.special_tokens_map.items()}
    # ids come from the folder's files: the class numbers whatever it adds in an order of its own
    own = {token["content"]: token for token in data["added_tokens"]}
    named = {
        key: {flag: value for flag, value in own[text].items() if flag != "id"} | {"special": True}
        for key, text in defaults.items()
        if key in NAMES and text in own
    }
    data |= {"model": data["model"] | {"vocab": ids}, "added_tokens": []}
    return data, NamedTokens({**named, **tokens.named}, tokens.extra, tokens.numbered)


def _class_name(folder: Path, config: Mapping[str, Any], model_type: object) -> str:
    name = config.get("tokenizer_class")
    if name is not None and not isinstance(name, str):
        raise ValueError(f"{folder}: tokenizer_class must be a text, got {_shown(name)}")
    name = (name or "").removesuffix("Fast")
    if name and name not in UNSAID:
        return name
    return (
        CLASSES.get(model_type, "GPT2Tokenizer") if isinstance(model_type, str) else "GPT2Tokenizer"
    )


def _class(name: str, folder: Path) -> Any:
    """A tokenizer class of transformers itself that is made from a vocabulary and merges."""
    try:
        import transformers
        from transformers.tokenization_utils_tokenizers import TokenizersBackend
    except ImportError as error:
        raise ValueError(
            "it has only a slow tokenizer; install transformers, or add a tokenizer.json"
        ) from error
    found = getattr(transformers, name, None) if re.fullmatch(r"\w+Tokenizer", name) else None
    model = getattr(found, "model", None)
    if (
        not isinstance(found, type)
        or not issubclass(found, TokenizersBackend)
        or not found.__module__.startswith("transformers.")
        or getattr(model, "__name__", None) != "BPE"
    ):
        raise ValueError(
            f"tokenizer_class {_shown(name)} is not one of transformers with merges, and code of a "
            "model's folder is not run; add a tokenizer.json"
        )
    return found


def _merges(path: Path) -> list[tuple[str, str]]:
    pairs = []
    for line in read_text(path).split("\n"):
        line = line.removesuffix("\r")
        if not line or line.startswith("#version"):
            continue
        left, space, right = line.partition(" ")
        if not space or " " in right:
            raise ValueError(f"{path} has a line that is not two tokens: {_shown(line)}")
        pairs.append((left, right))
    return pairs


def _shown(value: object) -> str:
    return one_line(repr(value), 80)
