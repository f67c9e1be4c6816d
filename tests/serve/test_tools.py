"""Calls of tools through the `openai` package, in both formats."""

import json

import jsonschema
import openai
import pytest

from jaxinfer.decode.token_mask import allows
from jaxinfer.serve.grammar import Grammar
from jaxinfer.serve.schema import Function
from jaxinfer.serve.tools import Format, calls_grammar, format_of
from jaxinfer.serve.vocabulary import Vocabulary
from tests.serve.serving import model, serving

NAME = "tiny-llama"
CITY = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Bern", "Rome"]},
        "days": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "Ask.", "parameters": CITY},
    },
    {"type": "function", "function": {"name": "now"}},
]
TURNS = [{"role": "user", "content": "How is the weather?"}]
LLAMA = """\
{% for tool in tools or [] %}{{ tool | tojson }} parameters{% endfor %}
{%- for m in messages %}<|start_header_id|>{{ m.role }}: {{ m.content or "" }}{% endfor %}"""
ASKED = {"model": NAME, "messages": TURNS, "tools": TOOLS, "max_tokens": 120}


def check(calls) -> None:
    for call in calls:
        assert call.type == "function" and call.id.startswith("call_")
        schema = {"weather": CITY, "now": {"type": "object", "maxProperties": 0}}
        jsonschema.validate(json.loads(call.function.arguments), schema[call.function.name])


@pytest.fixture(scope="module")
def llama(lm):
    with (
        model(LLAMA).batcher(slots=1, context=448, chunk=32) as batcher,
        serving(batcher) as server,
    ):
        yield server.client()


@pytest.fixture(params=["hermes", "llama"])
def either(request, client):
    return client if request.param == "hermes" else request.getfixturevalue("llama")


def test_a_named_tool_is_called_once_and_its_arguments_follow_the_schema(either):
    choice = {"type": "function", "function": {"name": "weather"}}
    for seed in range(3):
        found = either.chat.completions.create(**ASKED, tool_choice=choice, seed=seed).choices[0]
        assert found.finish_reason == "tool_calls" and found.message.content is None
        (call,) = found.message.tool_calls
        assert call.function.name == "weather"
        check([call])


def test_a_required_call_is_streamed_in_pieces_that_join_to_the_whole(either):
    asked = ASKED | {"tool_choice": "required", "parallel_tool_calls": False, "seed": 5}
    (whole,) = either.chat.completions.create(**asked).choices[0].message.tool_calls
    check([whole])
    chunks = list(either.chat.completions.create(**asked, stream=True))
    deltas = [d for c in chunks for d in c.choices[0].delta.tool_calls or []]
    assert deltas[0].function.name == whole.function.name and deltas[0].index == 0
    assert "".join(delta.function.arguments for delta in deltas) == whole.function.arguments
    assert len(deltas) > (2 if whole.function.name == "weather" else 1)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_several_required_calls_have_numbers_of_their_own(client):
    found = client.chat.completions.create(**ASKED, tool_choice="required", seed=1).choices[0]
    assert found.message.tool_calls
    check(found.message.tool_calls[: -1 if found.finish_reason == "length" else None])
    assert len({call.id for call in found.message.tool_calls}) == len(found.message.tool_calls)


def test_a_free_model_may_answer_with_text(client):
    for options in ({}, {"parallel_tool_calls": False}):
        found = client.chat.completions.create(**ASKED, temperature=0, **options).choices[0]
        assert found.message.content and not found.message.tool_calls
        assert found.finish_reason in ("length", "stop")


def test_without_a_choice_of_tools_the_prompt_does_not_show_them(client, server):
    found = client.chat.completions.create(**ASKED, tool_choice="none").usage.prompt_tokens
    plain = client.chat.completions.create(model=NAME, messages=TURNS, max_tokens=1)
    assert found == plain.usage.prompt_tokens
    shown = server.post("/tokenize", {"messages": TURNS, "tools": TOOLS}).json()["count"]
    assert shown > found + 30


def test_answers_of_tools_are_read_back(client, server):
    call = {"id": "call_1", "type": "function"}
    call["function"] = {"name": "weather", "arguments": '{"city": "Bern", "days": 1}'}
    turns = [
        *TURNS,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    tokens = server.post("/tokenize", {"messages": turns}).json()["tokens"]
    text = server.post("/detokenize", {"tokens": tokens}).json()["prompt"]
    assert '<tool_call>{"name": "weather", "arguments": {"city": "Bern", "days": 1}}' in text
    assert text.endswith("tool: rain\nassistant:")
    client.chat.completions.create(model=NAME, messages=turns, tools=TOOLS, max_tokens=1)
    call["function"]["arguments"] = "[1]"
    with pytest.raises(openai.BadRequestError, match="must be the text of a JSON object"):
        client.chat.completions.create(model=NAME, messages=turns, tools=TOOLS, max_tokens=1)


def test_a_strict_tool_is_called_as_its_schema_says_or_not_at_all(client):
    strict = [{"type": "function", "function": TOOLS[0]["function"] | {"strict": True}}]
    for seed in range(2):
        found = client.chat.completions.create(**ASKED | {"tools": strict, "seed": seed}).choices[0]
        assert found.message.content or found.message.tool_calls
        if found.finish_reason == "tool_calls":
            check(found.message.tool_calls)


def follows(vocabulary, text: str, answer: str) -> bool:
    """Whether an answer may be written, and end, under a grammar."""
    follower = Grammar(vocabulary, text).follow()
    eos = vocabulary.tokenizer.eos_token_ids[0]
    for token in [*vocabulary.tokenizer.encode(answer), eos]:
        if not allows(follower.mask(), token):
            return False
        follower.accept(token)
    return True


@pytest.mark.parametrize("form", Format)
def test_grammars_of_calls_allow_calls_and_nothing_else(lm, form):
    vocabulary = Vocabulary(lm)
    functions = [Function.model_validate(tool["function"]) for tool in TOOLS]
    begin, end, arguments, between = form.value

    def call(name: str, given: str) -> str:
        return f'{begin}{{"name": "{name}", "{arguments}": {given}}}{end}'

    one, other = call("weather", '{"city": "Bern", "days": 3}'), call("now", "{}")
    wrong = [call("weather", '{"city": "Paris", "days": 3}'), call("nothing", "{}"), one[:-1]]
    wrong += [call("weather", "{}"), call("now", '{"a": 1}')]
    forced = calls_grammar(form, functions, free=False, most=2)
    single = calls_grammar(form, functions, free=False, most=1)
    free = calls_grammar(form, functions, free=True, most=2)
    assert follows(vocabulary, forced, one) and follows(vocabulary, single, other)
    assert follows(vocabulary, forced, one + between + other)
    assert not follows(vocabulary, single, one + between + other)
    assert not any(follows(vocabulary, forced, text) for text in [*wrong, "rain", ""])
    assert not any(follows(vocabulary, free, text) for text in wrong)
    for text in ("rain", "", "a <b> c", one, one + between + other, "I ask. " + one):
        assert follows(vocabulary, free, text), text


@pytest.mark.parametrize(
    "fields, says",
    [
        (
            {"tool_choice": {"type": "function", "function": {"name": "no"}}},
            "there is no tool 'no'",
        ),
        ({"tools": [TOOLS[1], TOOLS[1]]}, "two of them have the same name"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"response_format": {"type": "json_object"}}, "cannot be combined with tools"),
    ],
)
def test_wrong_tools_are_refused(client, fields, says):
    with pytest.raises(openai.BadRequestError, match=says):
        client.chat.completions.create(**ASKED | fields)


def test_the_format_is_read_from_the_template():
    def found(template):
        return format_of(model(template).tokenizer)

    assert found(LLAMA) is Format.LLAMA
    assert found("{{ tools }}<tool_call>") is Format.HERMES
    assert found("{{ tools }}<tool_call><function=") is None
    assert found("{{ messages }}") is None and found("{{ tools }}") is None
