"""`Tokenizer`: a `tokenizers` pipeline with the special ids and the chat template of a checkpoint.

It reads and writes the files of a Hugging Face folder (tokenizer.json, tokenizer_config.json,
special_tokens_map.json, chat_template.jinja). Folders with only vocab.json and merges.txt are built
by their class (`slow_tokenizer`). Nothing in a folder is executed.
"""

import functools
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import tokenizers

from jaxinfer.files import one_line, read_json, read_text
from jaxinfer.io.chat_template import (
    render,
    render_chat,
    template_values,
    texts_of,
    with_texts,
)
from jaxinfer.io.chat_template_files import ChatTemplates, read_templates, write_templates
from jaxinfer.io.control_tokens import ControlTokens
from jaxinfer.io.slow_tokenizer import slow_tokenizer
from jaxinfer.io.special_tokens import read_named_tokens, with_tokens
from jaxinfer.io.tokenizer_json import backend_of, one_error, parse
from jaxinfer.typing import Json

SLOW_FILES = ("tokenizer.model", "spiece.model", "vocab.txt", "sentencepiece.bpe.model")


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back. `special` maps names such as "bos_token" to their text.

    `eos_token_ids` are all ids that end a text: the tokenizer's own and those of generation_config.
    `tool_template` is the chat template for conversations with tools, where that is another.
    """

    backend: tokenizers.Tokenizer
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    chat_template: str | None = None
    special: Mapping[str, str] = field(default_factory=dict)
    tool_template: str | None = None

    @classmethod
    def from_backend(
        cls,
        backend: tokenizers.Tokenizer,
        *,
        special: Mapping[str, str] | None = None,
        eos_token_ids: Sequence[int] = (),
        chat_template: str | None = None,
        tool_template: str | None = None,
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
        return cls(backend, ids.get("bos_token"), tuple(eos), chat_template, special, tool_template)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special: bool = True, control_tokens: bool = True) -> list[int]:
        """Token ids of `text`; with `add_special` also what the model expects around it (BOS).

        A control token that the text spells, such as "<|im_start|>", is read as one; with
        `control_tokens=False` it stays text.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text holds a lone surrogate at {error.start}; pass valid Unicode"
            ) from error
        if not control_tokens:
            return self._control_tokens.encode_literally(text, add_special)
        with one_error("the tokenizer cannot encode the text"):
            return self.backend.encode(text, add_special_tokens=add_special).ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of token ids."""
        numbers = [int(number) for number in ids]
        if any(not 0 <= number < 2**32 for number in numbers):
            raise ValueError(f"token ids must be non-negative, got {min(numbers)}")
        with one_error("the tokenizer cannot decode the ids"):
            return self.backend.decode(numbers, skip_special_tokens=skip_special)

    def apply_chat_template(
        self,
        messages: object,
        add_generation_prompt: bool = True,
        tools: object = None,
        documents: object = None,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """The prompt of a conversation, as `render_chat` makes it, to read; `encode_chat` gives
        its tokens."""
        return render_chat(
            self._template(tools),
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            documents=documents,
            variables={**self.special, **(variables or {})},
        )

    def encode_chat(
        self,
        messages: object,
        add_generation_prompt: bool = True,
        tools: object = None,
        documents: object = None,
        variables: Mapping[str, object] | None = None,
        after: Sequence[str] = (),
    ) -> list[int]:
        """Token ids of the prompt of a conversation.

        Control tokens are those that the template writes: what the messages, tools, documents and
        variables spell stays text.

        Args:
          after: texts of the prompt; only what follows the first of them that is there is encoded.
        """
        template, control = self._template(tools), self._control_tokens
        values = template_values(messages, add_generation_prompt, tools, documents, variables)
        own = {name: text for name, text in self.special.items() if name not in values}
        mark, marks = control.marker(texts_of(values), [template, *own.values()])
        values = with_texts(values, mark) if marks is not None else values
        text = render(template, {**own, **values})  # type: ignore[dict-item]
        for place in after:
            before, found, rest = text.partition(place)
            if found:
                text = rest
                break
        return control.encode(text, marks)

    @functools.cached_property
    def _control_tokens(self) -> ControlTokens:
        return ControlTokens(self.backend)

    def _template(self, tools: object) -> str:
        template = self.chat_template
        if tools is not None and self.tool_template is not None:
            template = self.tool_template
        if template is None:
            raise ValueError(
                "this model has no chat template; pass a plain prompt instead of messages"
            )
        return template

    def with_eos(self, eos_token_ids: Sequence[int]) -> "Tokenizer":
        """The same tokenizer with more ids that end a text."""
        extra = tuple(i for i in dict.fromkeys(eos_token_ids) if i not in self.eos_token_ids)
        return replace(self, eos_token_ids=self.eos_token_ids + extra)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and the chat templates."""
        folder = Path(folder)
        (folder / "tokenizer.json").write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        config = dict(self.special) | {"eos_token_ids": list(self.eos_token_ids)}
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
        write_templates(folder, ChatTemplates(self.chat_template, self.tool_template))

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """The tokenizer of a Hugging Face folder or of our own; ValueError if there is none."""
        folder = Path(folder)
        config = _optional_json(folder / "tokenizer_config.json")
        backend, special = _read_backend(folder, config)
        extra = config.get("eos_token_ids", [])
        if not isinstance(extra, list) or not all(type(i) is int and i >= 0 for i in extra):
            raise ValueError(f"{folder}: eos_token_ids must be a list of ids, got {_shown(extra)}")
        templates = read_templates(folder, config)
        loaded = cls.from_backend(
            backend,
            special=special,
            eos_token_ids=extra,
            chat_template=templates.default,
            tool_template=templates.tool_use,
        )
        _compare_bos(loaded, config, folder)
        return loaded


def has_tokenizer(folder: Path) -> bool:
    """Whether `Tokenizer.load` would find files to read."""
    names = ("tokenizer.json", "vocab.json", *SLOW_FILES)
    return any((folder / name).is_file() for name in names)


def compare_vocabularies(tokenizer: Tokenizer, vocab_size: int, where: object) -> None:
    """Warns where a tokenizer and a model of `vocab_size` tokens do not belong together."""
    beyond = [id for id in tokenizer.backend.get_vocab().values() if id >= vocab_size]
    if beyond:
        warnings.warn(
            f"{where}: the tokenizer has {len(beyond)} tokens (ids up to {max(beyond)}) beyond the "
            f"model's vocabulary of {vocab_size}; texts that contain them are refused",
            stacklevel=3,
        )
    if 2 * tokenizer.vocab_size < vocab_size:
        warnings.warn(
            f"{where}: the tokenizer has {tokenizer.vocab_size} tokens, the model {vocab_size}; "
            "what the model says beyond them has no text",
            stacklevel=3,
        )


def _optional_json(path: Path) -> Json:
    return read_json(path) if path.is_file() else {}


def _read_backend(folder: Path, config: Json) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """The pipeline of a folder, and its named tokens."""
    model = _optional_json(folder / "config.json")
    tokens = read_named_tokens(folder, config)
    if (folder / "tokenizer.json").is_file():
        where = folder / "tokenizer.json"
        data = parse(read_text(where), where)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        where = folder / "vocab.json"
        data, tokens = slow_tokenizer(folder, config, model.get("model_type"), tokens)
    else:
        only = [name for name in SLOW_FILES if (folder / name).is_file()]
        raise ValueError(
            f"{folder} has no tokenizer that can be read{f', only {only[0]}' if only else ''}; "
            "expected tokenizer.json, or vocab.json and merges.txt; AutoTokenizer and "
            "save_pretrained of transformers write a tokenizer.json"
        )
    room = model.get("vocab_size")
    try:
        data = with_tokens(data, tokens, room if type(room) is int else None, folder)
    except ValueError as error:
        raise ValueError(f"{where} is not a valid tokenizer: {error}") from error
    backend = backend_of(data, where)
    special = {name: token["content"] for name, token in tokens.named.items()}
    return backend, {
        n: text for n, text in special.items() if backend.token_to_id(text) is not None
    }


def _compare_bos(tokenizer: Tokenizer, config: Json, folder: Path) -> None:
    """The file decides whether a text begins with BOS; older configs say it once more."""
    said = config.get("add_bos_token")
    if not isinstance(said, bool) or tokenizer.bos_token_id is None:
        return
    adds = tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
    if adds != said:
        warnings.warn(
            f"{folder}: tokenizer_config.json says add_bos_token={said}, but the tokenizer "
            f"{'adds' if adds else 'does not add'} one; the tokenizer holds",
            stacklevel=3,
        )


def prepend_token(backend: tokenizers.Tokenizer, text: str) -> None:
    """Make `backend` start every text with the special token `text`."""
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=[text, "$A"],
        pair=[text, "$A", "$B"],
        special_tokens=[(text, backend.token_to_id(text))],
    )


def _shown(value: object) -> str:
    return one_line(repr(value), 80)
