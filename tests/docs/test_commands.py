"""Commands in the documentation exist, with every option that is given; nothing is run."""

import importlib
import shlex
from pathlib import Path

import pytest
import typer

from jaxinfer.cli.app import app
from tests.docs.markdown import PAGES, ROOT, blocks, name, prose

FOLDERS = ("jaxinfer/", "pallas_kernels/", "tools/", "bench/", "tests/", "docs/")
SHELL = ("", "shell", "console", "bash")


def commands(page: Path) -> list[str]:
    """The single commands of a page's shell blocks."""
    found = []
    for block in blocks(page, *SHELL):
        text = block.text.replace("\\\n", " ")
        for line in text.splitlines():
            found += [part.strip() for part in line.split(" #")[0].split("&&")]
    return [command for command in found if command]


def parse(command, words: list[str], parent=None) -> None:
    """Reads `words` with the parser of a command line and its sub-commands."""
    context = command.make_context(command.name, list(words), parent=parent)
    if hasattr(command, "commands"):
        verb, child, rest = command.resolve_command(context, words)
        child.name = verb
        parse(child, rest, context)


def script_parser(path: str):
    """The parser of a script under tools/, or None where it has another kind."""
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    if isinstance(getattr(module, "app", None), typer.Typer):
        return typer.main.get_command(module.app)
    single = typer.Typer()
    single.command()(module.main)
    return typer.main.get_command(single)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_jaxinfer_commands_parse(page):
    root = typer.main.get_command(app)
    for command in commands(page):
        words = shlex.split(command)
        if words[0] == "jaxinfer" and "--help" not in words:
            parse(root, words[1:])


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_scripts_exist_and_their_commands_parse(page):
    for command in commands(page):
        words = shlex.split(command)
        if words[0] != "python" or words[1].startswith("-"):
            continue
        assert (ROOT / words[1]).is_file(), command
        if words[1].startswith(("tools/reproduce/", "tools/data/")):
            parse(script_parser(words[1]), words[2:])


def test_a_wrong_option_does_not_parse():
    root = typer.main.get_command(app)
    with pytest.raises(Exception, match="No such option"):
        parse(root, ["generate", "text", "--no-such-option"])


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_named_in_prose_exist(page):
    """But for what a command makes, which git ignores."""
    made = (ROOT / ".gitignore").read_text().split()
    for word in prose(page).replace("(", " ").replace(")", " ").split():
        path = word.strip("`.,;:|*").partition("#")[0]
        if path.startswith(FOLDERS) and not set("*{") & set(path) and "NAME" not in path:
            there = (ROOT / path).exists() or f"{path.rstrip('/')}/" in made
            assert there, f"{name(page)} names {path}"
