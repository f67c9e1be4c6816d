"""Tools that a model may call: how its template asks for calls, and what makes it keep to them."""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from jaxinfer.io.tokenizer import Tokenizer
from jaxinfer.serve.context import Context
from jaxinfer.serve.errors import ApiError
from jaxinfer.serve.grammar import BLANKS, Grammar, check_fields, compiled
from jaxinfer.serve.schema import ChatRequest, Function, NamedTool, Tool
from jaxinfer.serve.tool_parser import (
    CLOSE,
    OPEN,
    HermesParser,
    LlamaParser,
    Parser,
    PlainParser,
)

NOTHING: dict[str, object] = {"type": "object", "properties": {}, "additionalProperties": False}
"""The schema of a tool that names no parameters."""

MOST_CALLS = 8
"""In one answer, where they are forced."""


class Format(Enum):
    """How a model writes calls: the tags around one, the name of its arguments, and what stands
    between two."""

    HERMES = (OPEN + "\n", "\n" + CLOSE, "arguments", "\n")
    LLAMA = ("", "", "parameters", "; ")


def format_of(tokenizer: Tokenizer) -> Format | None:
    """The format that the chat template teaches; None where it knows no tools."""
    template = tokenizer.tool_template or tokenizer.chat_template or ""
    if "tools" not in template:
        return None
    if OPEN in template and "<function=" not in template:
        token = tokenizer.backend.get_added_tokens_decoder().get(
            tokenizer.backend.token_to_id(OPEN) or -1
        )
        # A control token is not in the text that is read.
        return None if token is not None and token.special else Format.HERMES
    if "<|start_header_id|>" in template and "parameters" in template:
        return Format.LLAMA
    return None


@dataclass(frozen=True)
class Tools:
    """The tools of a request: those that its prompt shows, how they are parsed, and the grammar
    that forces calls, if something does."""

    shown: Sequence[Tool] | None
    parser: Callable[[], Parser]
    grammar: Grammar | None


def tools_of(context: Context, body: ChatRequest) -> Tools:
    """What the fields `tools`, `tool_choice` and `parallel_tool_calls` ask for.

    Raises:
      ApiError: 400, they contradict each other; 422, the model cannot call tools.
    """
    tools, choice = body.tools or [], body.tool_choice
    names = [tool.function.name for tool in tools]
    wanted = choice.function.name if isinstance(choice, NamedTool) else None
    if not tools:
        if choice not in (None, "none", "auto"):
            raise ApiError(400, "tool_choice needs tools", param="tool_choice")
        return Tools(None, PlainParser, None)
    if len(set(names)) < len(names):
        raise ApiError(400, "tools: two of them have the same name", param="tools")
    if wanted is not None and wanted not in names:
        raise ApiError(400, f"tool_choice: there is no tool {wanted!r}", param="tool_choice")
    if choice == "none":
        return Tools(None, PlainParser, None)
    form = format_of(context.vocabulary.tokenizer)
    if form is None:
        raise ApiError(
            422, "tools: the chat template of this model knows no tools, or writes calls in "
            "another form than Hermes and Llama 3; leave them out", param="tools",
            code="tools_unsupported",
        )  # fmt: skip
    free = ("response_format", "regex", "choice", "grammar")
    if other := next((name for name in free if getattr(body, name) is not None), None):
        raise ApiError(
            400, f"{other} cannot be combined with tools; use tool_choice none", param=other
        )
    parser = HermesParser if form is Format.HERMES else LlamaParser
    return Tools(tools, functools.partial(parser, frozenset(names)), _grammar(context, body, form))


def _grammar(context: Context, body: ChatRequest, form: Format) -> Grammar | None:
    """What forces calls, or their form; None where the model is free."""
    functions = [tool.function for tool in body.tools or []]
    choice, single = body.tool_choice, body.parallel_tool_calls is False
    if isinstance(choice, NamedTool):
        single, functions = True, [one for one in functions if one.name == choice.function.name]
    free = choice in (None, "auto")
    if free and not single and not any(one.strict for one in functions):
        return None
    check_fields(body, "tool_choice")
    text = calls_grammar(form, functions, free=free, most=1 if single else MOST_CALLS)
    return compiled(context.vocabulary, lambda: text, "tools")


def calls_grammar(form: Format, functions: Sequence[Function], *, free: bool, most: int) -> str:
    """The Lark grammar of up to `most` calls; of a text with calls in it if `free`."""
    begin, end, arguments, between = form.value
    lines = []
    for i, function in enumerate(functions):
        head = f'{{"name": {json.dumps(function.name)}, "{arguments}": '
        schema = (
            NOTHING if function.parameters is None else {"type": "object"} | function.parameters
        )
        schema = schema | {"x-guidance": {"whitespace_pattern": BLANKS}}
        lines.append(f"call_{i}: {json.dumps(head)} %json {json.dumps(schema)} " + '"}"')
    lines.append("call: " + " | ".join(f"call_{i}" for i in range(len(functions))))
    quoted_begin, quoted_end = json.dumps(begin), json.dumps(end)
    tagged = f"{quoted_begin} call {quoted_end}" if begin else "call"
    if not free:
        more = f"({json.dumps(between)} tagged){{0,{most - 1}}}" if most > 1 else ""
        lines += [f"start: tagged {more}", f"tagged: {tagged}"]
    elif form is Format.HERMES:
        rest = json.dumps(begin.removeprefix(OPEN))
        lines += [
            f"start: tagged{{0,{most}}} TEXT", f"tagged: open {rest} call {quoted_end}",
            f"open[lazy]: TEXT {json.dumps(OPEN)}", r"TEXT: /(.|\n)*/",
        ]  # fmt: skip
    else:
        more = f"({json.dumps(between)} call){{0,{most - 1}}}" if most > 1 else ""
        lines += [f"start: call {more} | FREE", r"FREE: /([^{](.|\n)*)?/"]
    return "\n".join(lines)
