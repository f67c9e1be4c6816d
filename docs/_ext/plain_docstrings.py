"""Lets docstrings be plain text with `code` and indented examples.

The project's docstrings are read in editors and terminals first, so they have no reStructuredText
markup. What would be markup by accident (an asterisk that multiplies, a name that ends in an
underscore) is escaped here, and an indented block becomes a block of code.
"""

import inspect
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from sphinx.application import Sphinx
from sphinx.util.typing import stringify_annotation

from jaxinfer.cache.presets import PolicyLike
from jaxinfer.decode.model import Prompt
from jaxinfer.names import DraftLike

CODE = re.compile(r"(``.*?``|`[^`]*`)", re.DOTALL)
ACCIDENTS = re.compile(r"([*|]|(?<=\w)_(?!\w))")
SECTIONS = ("Args", "Returns", "Raises", "Yields", "Attributes", "Note")
FIELD = "Alias for field number"
MODULES = re.compile(r"\b(?:jaxlib\._jax|jax\._src\.\w+|jax)\.(?=[A-Z])")

ALIASES = {
    stringify_annotation(alias, "smart"): name
    for name, alias in {"PolicyLike": PolicyLike, "DraftLike": DraftLike, "Prompt": Prompt}.items()
}


def plain(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Rewrites the lines of one docstring in place, before napoleon reads its sections."""
    if lines and lines[0].startswith(FIELD):  # what a NamedTuple says of its own
        lines.clear()
    parts = CODE.split("\n".join(lines))
    parts[::2] = [ACCIDENTS.sub(r"\\\1", part) for part in parts[::2]]
    parts[1::2] = ["``" + part.strip("`").replace("\n", " ") + "``" for part in parts[1::2]]
    for index in range(2, len(parts), 2):
        if parts[index][:1].isalnum():  # `Completion`s
            parts[index] = "\\ " + parts[index]
    lines[:] = list(code_blocks("".join(parts).split("\n")))


def restored(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Undoes what napoleon makes of a property whose text has a colon: it takes that for a type."""
    if isinstance(obj, property | cached_property) and any(
        line.startswith(":type:") for line in lines
    ):
        lines[:] = (inspect.getdoc(obj) or "").split("\n")
        plain(app, what, name, obj, options, lines)


def signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, text: str | None, result: str | None
) -> tuple[str | None, str | None]:
    """The signature with aliases by name, and jax's types without the modules that define them."""
    for union, alias in ALIASES.items():
        text = text and text.replace(union, alias)
    return text and MODULES.sub("", text), result and MODULES.sub("", result)


def code_blocks(lines: list[str]) -> Iterator[str]:
    """The lines, with every indented block that is no section such as Args marked as code."""
    in_section = in_code = False
    previous = ""
    for line in lines:
        indented = line.startswith(" ")
        if line.strip() and not indented:
            in_section = line.endswith(":") and line.rstrip(":") in SECTIONS
            in_code = line in ("Example:", "Examples:")
            line = "Example::" if in_code else line
        elif indented and not in_section and not in_code:
            if not previous.strip():
                yield "::"
                yield ""
            in_code = True
        if in_code and indented:
            line = line.replace("\\", "")
            if previous.strip() and not previous.startswith(" "):
                yield ""
        yield line
        previous = line


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", plain, priority=100)
    app.connect("autodoc-process-docstring", restored, priority=900)  # napoleon has 500
    app.connect("autodoc-process-signature", signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
