"""The directive `command-reference`: every verb of `jaxinfer` with its arguments and options, read
from the commands themselves when the documentation is built.
"""

from collections.abc import Iterator
from typing import Any

import typer
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from jaxinfer.cli.app import app as commands


def leaves(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command below `command` that runs something, with its full name."""
    if not hasattr(command, "commands"):
        yield path, command
        return
    for name, child in command.commands.items():
        yield from leaves(child, (*path, name))


def text_with_code(text: str) -> nodes.paragraph:
    """A paragraph in which what stands in backticks is code."""
    paragraph = nodes.paragraph()
    for index, part in enumerate(text.split("`")):
        paragraph += nodes.literal(text=part) if index % 2 else nodes.Text(part)
    return paragraph


class CommandReference(SphinxDirective):
    """One section per verb, in the order of `jaxinfer --help`."""

    def run(self) -> list[nodes.Node]:
        root = typer.main.get_command(commands)
        return [self.section(path, command) for path, command in leaves(root, ("jaxinfer",))]

    def section(self, path: tuple[str, ...], command: Any) -> nodes.section:
        name = " ".join(path)
        section = nodes.section(ids=["-".join(path)], names=[name])
        section += nodes.title(text=name)
        context = command.make_context(name, [], resilient_parsing=True)
        usage = command.get_usage(context).removeprefix("Usage: ")
        section += nodes.literal_block(usage, usage, language="text")
        for paragraph in (command.help or "").split("\n\n"):
            section += self.paragraph(" ".join(paragraph.split()))
        records = [p.get_help_record(context) for p in command.get_params(context)]
        section += self.definitions([record for record in records if record is not None])
        return section

    def paragraph(self, text: str) -> nodes.Node:
        if text.startswith("Example: "):
            example = text.removeprefix("Example: ")
            return nodes.literal_block(example, example, language="shell")
        return text_with_code(text)

    def definitions(self, records: list[tuple[str, str]]) -> nodes.definition_list:
        found = nodes.definition_list()
        for option, text in records:
            item = nodes.definition_list_item()
            term = nodes.term()
            term += nodes.literal(text=option)
            item += term
            item += nodes.definition("", text_with_code(text))
            found += item
        return found


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("command-reference", CommandReference)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
