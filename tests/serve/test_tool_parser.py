"""Calls are read from text however it is cut, and what is no call stays text."""

import json

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from jaxinfer.serve.chat import message_of
from jaxinfer.serve.tool_parser import HermesParser, LlamaParser, Text

NAMES = ("look_up", "now")
ARGUMENTS = st.dictionaries(
    st.text(max_size=5),
    st.one_of(st.integers(), st.text(max_size=8), st.lists(st.booleans(), max_size=2), st.none()),
    max_size=3,
)
CALLS = st.lists(st.tuples(st.sampled_from(NAMES), ARGUMENTS), min_size=1, max_size=3)
CUTS = st.lists(st.integers(0, 400), max_size=20)


def read(parser, text: str, cuts) -> tuple[str, list[tuple[str, str]], list]:
    places = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    parts = [
        part
        for first, last in zip(places, places[1:], strict=False)
        for part in parser.push(text[first:last])
    ] + parser.push("", last=True)
    found, calls = message_of(parts)
    return found, [(begin.name, arguments) for begin, arguments in calls], parts


def written(name: str, arguments: dict, key: str, indent: int | None, swapped: bool) -> str:
    call = {"name": name, key: arguments}
    return json.dumps(dict(reversed(call.items())) if swapped else call, indent=indent)


@given(calls=CALLS, cuts=CUTS, before=st.sampled_from(["", "I look.", "a < b\n"]),
       indent=st.sampled_from([None, 2]), swapped=st.booleans())  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_hermes_calls_are_read_however_the_text_is_cut(calls, cuts, before, indent, swapped):
    texts = [written(*call, "arguments", indent, swapped) for call in calls]
    text = before + "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in texts)
    found, made, _ = read(HermesParser(NAMES), text, cuts)
    assert found == before.rstrip()
    assert [(name, json.loads(arguments)) for name, arguments in made] == calls


@given(calls=CALLS, cuts=CUTS, indent=st.sampled_from([None, 2]), swapped=st.booleans())
@settings(max_examples=150, deadline=None)
def test_llama_calls_are_read_however_the_text_is_cut(calls, cuts, indent, swapped):
    text = "; ".join(written(*call, "parameters", indent, swapped) for call in calls)
    found, made, _ = read(LlamaParser(NAMES), "\n" + text, cuts)
    assert found == ""
    assert [(name, json.loads(arguments)) for name, arguments in made] == calls


@pytest.mark.parametrize("parser", [HermesParser, LlamaParser])
@given(
    text=st.one_of(
        st.text(max_size=60),
        st.lists(
            st.sampled_from([
                "<tool_call>", "</tool_call>", '{"name": "now"', ', "arguments": ', "{}", "}",
                "<tool", '{"name": "other", "arguments": {}}', "\n", " ", "text", "{", '"',
            ]),
            max_size=8,
        ).map("".join),
    ),
    cuts=CUTS,
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_any_text_gives_the_same_however_it_is_cut_and_loses_no_words(parser, text, cuts):
    found, made, _ = read(parser(NAMES), text, cuts)
    assert (found, made) == read(parser(NAMES), text, [])[:2]
    if not made:
        assert found.split() == text.split()


def test_arguments_come_while_they_are_written():
    parser = HermesParser(NAMES)
    assert parser.push('so <tool_call>{"name": "now", ') == [Text("so")]
    begin, first = parser.push('"arguments": {"a": "x')
    assert (begin.name, first.text) == ("now", '{"a": "x')
    (second,) = parser.push('yz"}')
    assert second.text == 'yz"}' and parser.push("}\n</tool") == []
    assert parser.push("_call>", last=True) == []


def test_a_call_of_what_there_is_not_is_text():
    text = '<tool_call>{"name": "other", "arguments": {}}</tool_call>'
    assert read(HermesParser(NAMES), text, [])[:2] == (text, [])
    assert read(LlamaParser(NAMES), '{"a": 1} and', [])[:2] == ('{"a": 1} and', [])
