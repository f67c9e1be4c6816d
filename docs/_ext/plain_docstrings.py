"""Lets docstrings be plain text with `code` and indented examples.

The project's docstrings are read in editors and terminals first, so they have no reStructuredText
markup. What would be markup by accident (an asterisk that multiplies, a name that ends in an
underscore) is escaped here, and an indented block becomes a block of code.
"""

import re
from typing import Any

from sphinx.application import Sphinx

CODE = re.compile(r"(``.*?``|`[^`]*`)", re.DOTALL)
ACCIDENTS = re.compile(r"([*|]|(?<=\w)_(?!\w))")
SECTIONS = ("Args", "Returns", "Raises", "Yields", "Attributes", "Note")


def plain(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Rewrites the lines of one docstring in place, before napoleon reads its sections."""
    text = "\n".join(lines)
    parts = CODE.split(text)
    parts[::2] = [ACCIDENTS.sub(r"\\\1", part) for part in parts[::2]]
    parts[1::2] = ["``" + part.strip("`").replace("\n", " ") + "``" for part in parts[1::2]]
    lines[:] = list(_code_blocks("".join(parts).split("\n")))


def _code_blocks(lines: list[str]):
    """Marks every indented block that is no section of Args and the like as code."""
    in_section = in_code = False
    previous = ""
    for line in lines:
        indented = line.startswith("    ")
        if line.strip() and not indented:
            in_section = line.rstrip(":") in SECTIONS and line.endswith(":")
            in_code = False
            if line in ("Example:", "Examples:"):
                line = "Example::"
                in_code = True
        elif indented and not in_section and not in_code:
            if not previous.strip():
                yield "::"
                yield ""
            in_code = True
        if in_code and indented:
            line = line.replace("\\", "")
            if previous.strip() and not previous.startswith("    "):
                yield ""
        yield line
        previous = line


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", plain, priority=100)  # napoleon comes at 500
    return {"parallel_read_safe": True, "parallel_write_safe": True}
