"""`Tokenizer`: a `tokenizers` pipeline with the special ids and the chat template of a checkpoint.

It reads and writes the files of a Hugging Face folder (tokenizer.json, tokenizer_config.json,
special_tokens_map.json, chat_template.jinja). Folders with only vocab.json and merges.txt are built
as GPT-2 byte-level BPE; any other slow tokenizer is converted once by transformers.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tokenizers

from jaxinfer.files import one_line, read_json, read_text
from jaxinfer.io.chat_template import render_chat

SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
SLOW_FILES = ("tokenizer.model", "spiece.model", "vocab.txt", "sentencepiece.bpe.model")


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back. `special` maps names such as "bos_token" to their text.

    `eos_token_ids` are all ids that end a text: the tokenizer's own and those of generation_config.
    """

    backend: tokenizers.Tokenizer
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    chat_template: str | None = None
    special: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_backend(
        cls,
        backend: tokenizers.Tokenizer,
        *,
        special: Mapping[str, str] | None = None,
        eos_token_ids: Sequence[int] = (),
        chat_template: str | None = None,
    ) -> "Tokenizer":
        """A tokenizer of a `tokenizers` pipeline; `special` names its bos, eos, ... texts."""
        special = dict(special or {})
        ids = {name: backend.token_to_id(text) for name, text in special.items()}
        for name, number in ids.items():
            if number is None and name in ("bos_token", "eos_token"):
                raise ValueError(f"{name} {special[name]!r} is not in the tokenizer's vocabulary")
        own = ids.get("eos_token")
        eos = [own] if own is not None else []
        eos += [int(number) for number in eos_token_ids if number not in eos]
        return cls(backend, ids.get("bos_token"), tuple(eos), chat_template, special)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of `text`; with `add_special` also what the model expects around it (BOS)."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text holds a lone surrogate at {error.start}; pass valid Unicode"
            ) from error
        return self.backend.encode(text, add_special_tokens=add_special).ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of token ids."""
        numbers = [int(number) for number in ids]
        if any(not 0 <= number < 2**32 for number in numbers):
            raise ValueError(f"token ids must be non-negative, got {min(numbers)}")
        return self.backend.decode(numbers, skip_special_tokens=skip_special)

    def apply_chat_template(self, messages: object, add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation, a list of {"role", "content"}; encode it without BOS."""
        if self.chat_template is None:
            raise ValueError(
                "this model has no chat template; pass a plain prompt instead of messages"
            )
        return render_chat(
            self.chat_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            variables=self.special,
        )

    def with_eos(self, eos_token_ids: Sequence[int]) -> "Tokenizer":
        """The same tokenizer with more ids that end a text."""
        extra = tuple(i for i in dict.fromkeys(eos_token_ids) if i not in self.eos_token_ids)
        return replace(self, eos_token_ids=self.eos_token_ids + extra)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
        folder = Path(folder)
        self.backend.save(str(folder / "tokenizer.json"))
        config = dict(self.special) | {"eos_token_ids": list(self.eos_token_ids)}
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """The tokenizer of a Hugging Face folder or of our own; ValueError if there is none."""
        folder = Path(folder)
        config = _optional_json(folder / "tokenizer_config.json")
        if (folder / "tokenizer.json").is_file():
            backend = load_backend(folder / "tokenizer.json")
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            backend = _byte_level_bpe(folder)
            _add_bos(backend, config, _special_texts(folder, config))
        elif any((folder / name).is_file() for name in SLOW_FILES):
            backend = _convert_slow(folder)
        else:
            raise ValueError(
                f"{folder} has no tokenizer; expected tokenizer.json, or vocab.json and merges.txt"
            )
        special = _special_texts(folder, config)
        for name in [n for n in special if backend.token_to_id(special[n]) is None]:
            # some folders name special tokens that their vocabulary does not have
            special.pop(name)
        extra = config.get("eos_token_ids", [])
        if not isinstance(extra, list) or not all(type(i) is int and i >= 0 for i in extra):
            raise ValueError(f"{folder}: eos_token_ids must be a list of ids, got {extra!r}")
        return cls.from_backend(
            backend,
            special=special,
            eos_token_ids=extra,
            chat_template=_chat_template(folder, config),
        )


def has_tokenizer(folder: Path) -> bool:
    """Whether `Tokenizer.load` would find files to read."""
    names = ("tokenizer.json", "vocab.json", *SLOW_FILES)
    return any((folder / name).is_file() for name in names)


def load_backend(path: Path) -> tokenizers.Tokenizer:
    """The `tokenizers` pipeline of a tokenizer.json."""
    text = read_text(path)
    try:
        return tokenizers.Tokenizer.from_str(text)
    except BaseException as error:
        # the Rust side raises a bare Exception, and a panic derives from BaseException
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise ValueError(f"{path} is not a valid tokenizer.json: {one_line(error)}") from error


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _special_texts(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    merged = _optional_json(folder / "special_tokens_map.json") | {
        name: value for name, value in config.items() if value is not None
    }
    special = {}
    for name in SPECIAL:
        value = merged.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{folder}: {name} must be a text, got {value!r}")
        if value:
            special[name] = value
    return special


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return read_text(path)
    value = config.get("chat_template")
    if value is None and (folder / "chat_template.json").is_file():
        value = read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(value, list):
        named = {
            entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)
        }
        value = named.get("default", next(iter(named.values()), None))
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{folder}: chat_template must be a text, got {type(value).__name__}")
    return value


def _byte_level_bpe(folder: Path) -> tokenizers.Tokenizer:
    """GPT-2's tokenizer from vocab.json and merges.txt, with the tokens of added_tokens.json."""
    try:
        model = tokenizers.models.BPE.from_file(
            str(folder / "vocab.json"), str(folder / "merges.txt")
        )
    except Exception as error:
        raise ValueError(
            f"{folder}: vocab.json and merges.txt are not a BPE vocabulary: {one_line(error)}"
        ) from error
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    added = _optional_json(folder / "added_tokens.json")
    backend.add_special_tokens(sorted(added, key=added.__getitem__))
    special = _special_texts(folder, _optional_json(folder / "tokenizer_config.json"))
    backend.add_special_tokens(
        [text for text in dict.fromkeys(special.values()) if backend.token_to_id(text) is not None]
    )
    return backend


def _add_bos(backend: tokenizers.Tokenizer, config: dict, special: dict[str, str]) -> None:
    """OPT's slow tokenizer starts every text with BOS and says so in its config."""
    bos = special.get("bos_token")
    if config.get("add_bos_token") and bos is not None and backend.token_to_id(bos) is not None:
        prepend_token(backend, bos)


def prepend_token(backend: tokenizers.Tokenizer, text: str) -> None:
    """Make `backend` start every text with the special token `text`."""
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=[text, "$A"],
        pair=[text, "$A", "$B"],
        special_tokens=[(text, backend.token_to_id(text))],
    )


def _convert_slow(folder: Path) -> tokenizers.Tokenizer:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ValueError(
            f"{folder} has only a slow tokenizer; install transformers, or add a tokenizer.json"
        ) from error
    try:
        slow = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        raise ValueError(
            f"transformers cannot convert the tokenizer in {folder}: {one_line(error)}; "
            "save it with save_pretrained of a fast tokenizer and use its tokenizer.json"
        ) from error
    backend = getattr(slow, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise ValueError(f"{folder}: {type(slow).__name__} has no fast form; add a tokenizer.json")
    return backend
