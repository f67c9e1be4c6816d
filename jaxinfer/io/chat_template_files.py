"""Where checkpoints keep their chat templates, and which of several is meant.

A Hugging Face folder has chat_template.jinja, or an entry `chat_template` in chat_template.json or
tokenizer_config.json, which is a text or a list of {"name", "template"}; further ones lie in
additional_chat_templates/NAME.jinja. A GGUF file has tokenizer.chat_template and
tokenizer.chat_template.NAME. Of the names, "default" and "tool_use" have a meaning here as in
transformers. A template is only kept; it is compiled where it is rendered.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from jaxinfer.files import one_line, read_json, read_text

FILE = "chat_template.jinja"
FOLDER = "additional_chat_templates"
NAMES = ("default", "tool_use")


class ChatTemplates(NamedTuple):
    """The template of a conversation, and the one with tools where that is another."""

    default: str | None = None
    tool_use: str | None = None


def read_templates(folder: Path, config: Mapping[str, object]) -> ChatTemplates:
    """The templates of a folder whose tokenizer_config.json is `config`."""
    found: dict[str, str] = {}
    for path in (folder / FILE, *(folder / FOLDER / f"{name}.jinja" for name in NAMES)):
        if path.is_file():
            found.setdefault("default" if path.name == FILE else path.stem, read_text(path))
    other = folder / "chat_template.json"
    if not found and other.is_file():
        found = _named(read_json(other).get("chat_template"), f"{other}: chat_template")
    if not found:
        found = _named(config.get("chat_template"), f"{folder}: chat_template")
    return _chosen(found)


def gguf_templates(metadata: Mapping[str, object], where: str) -> ChatTemplates:
    """The templates in the metadata of a GGUF file."""
    found: dict[str, str] = {}
    for name, key in (
        ("default", "tokenizer.chat_template"),
        ("tool_use", "tokenizer.chat_template.tool_use"),
    ):
        value = metadata.get(key)
        if isinstance(value, str):
            found[name] = value
        elif value is not None:
            raise ValueError(f"{where}: {key} must be a text, got {type(value).__name__}")
    return _chosen(found)


def write_templates(folder: Path, templates: ChatTemplates) -> None:
    """The files from which `read_templates` reads the same."""
    if templates.default is not None:
        (folder / FILE).write_text(templates.default, encoding="utf-8")
    if templates.tool_use is not None:
        (folder / FOLDER).mkdir(exist_ok=True)
        (folder / FOLDER / "tool_use.jinja").write_text(templates.tool_use, encoding="utf-8")


def _named(value: object, where: str) -> dict[str, str]:
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if not isinstance(value, list):
        raise ValueError(f"{where} must be a text, got {type(value).__name__}")
    found: dict[str, str] = {}
    for entry in value:
        name = entry.get("name") if isinstance(entry, dict) else None
        template = entry.get("template") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not isinstance(template, str):
            raise ValueError(
                f"{where} must be a text or a list of {{'name': text, 'template': text}}, "
                f"got the entry {one_line(repr(entry)[:80], 80)}"
            )
        found[name] = template
    return found


def _chosen(found: Mapping[str, str]) -> ChatTemplates:
    default = found.get("default", next(iter(found.values()), None))
    return ChatTemplates(default, found.get("tool_use"))
